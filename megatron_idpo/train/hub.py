"""Uploading an export to the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.parallel.world import is_rank0, raise_on_all_ranks
from megatron_idpo.train.run_directory import RunDirectory


def check_can_push(config: RunConfig, output: RunDirectory) -> None:
    """Create the repositories to upload to before training, which checks the token. Collective.

    Only in the first start of a run: the hub need not be reachable to resume.

    Raises:
        CheckpointError: on every rank; the hub refuses it or cannot be reached.
    """
    with raise_on_all_ranks("checking the repository on the hub"):
        repository = config.export.push_to_hub
        if repository is None or not is_rank0() or output.config.exists():
            return
        names = [repository]
        names += [config.export.adapter_repository] if config.uploads_adapter else []
        for name in names:
            create_repository(name, private=config.export.private)


def create_repository(name: str, *, private: bool) -> None:
    """Create a repository, or check that files may be written to it if it exists.

    Raises:
        CheckpointError: the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi

    remedy = "`hf auth login` with a token that may write, and check the name; or leave it out and "
    with _reported(name, "cannot be written", f"{remedy}`hf upload` the export later"):
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.auth_check(name, write=True)


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

    remedy = f"`hf auth login`, then `hf upload {repository} {directory}`"
    with _reported(repository, "cannot be uploaded", f"the export is complete; {remedy}"):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Upload by megatron-idpo"
        )


@contextmanager
def _reported(repository: str, message: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client's HTTP library has its own network errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        location = f"export.push_to_hub {repository}"
        raise CheckpointError.at(location, f"{message}: {reason}", remedy) from error
