"""Uploading an export to the Hugging Face hub."""

from pathlib import Path

from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.parallel.world import is_rank0, raise_on_all_ranks


def push(repository: str, directory: Path, *, private: bool) -> None:
    """Upload a directory, creating the repository if it does not exist. Collective.

    The endpoint and the token are those of `huggingface_hub`: `HF_ENDPOINT`, `HF_TOKEN`, or those
    that `hf auth login` has stored.

    Raises:
        CheckpointError: on every rank; the hub refuses it or cannot be reached.
    """
    with raise_on_all_ranks("uploading to the hub"):
        if is_rank0():
            _push(repository, directory, private=private)


def _push(repository: str, directory: Path, *, private: bool) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Upload by megatron-idpo"
        )
    except Exception as error:  # the client's HTTP library has its own network errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError.at(
            f"export.push_to_hub {repository}",
            f"cannot be uploaded: {reason}",
            f"the export is complete; `hf auth login`, then `hf upload {repository} {directory}`",
        ) from error
