"""Loading a Transformers model for evaluation, with every weight checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from megatron_idpo.console.text import format_count
from megatron_idpo.convert.hf_io.safetensors_file import check_tensors
from megatron_idpo.errors import CheckpointError, library_reason


def load_hf_model(auto_class: Any, path: str, *, location: str, remedy: str, **options: Any) -> Any:
    """Loads a model; weights that are missing or, in an export of training, changed are an error.

    Args:
        auto_class: a Transformers class such as `AutoModelForCausalLM`.
        path: directory or hub name.
        location: of errors.
        remedy: of errors.
        options: of `from_pretrained`.

    Raises:
        CheckpointError: it cannot be loaded; weights have been changed, or are missing, such as
            the head of a reward model in a causal language model.
    """
    check_weights(Path(path))
    try:
        with hide_loading_bar():
            model, info = auto_class.from_pretrained(
                path, output_loading_info=True, trust_remote_code=False, **options
            )
    # Depending on the files, the library raises almost any type of exception.
    except Exception as error:
        message = f"cannot load {path}: {library_reason(error)}"
        raise CheckpointError.at(location, message, remedy) from error
    if missing := sorted(info["missing_keys"]):
        message = f"{path} lacks {format_count(len(missing), 'weight')}, first {missing[0]}"
        raise CheckpointError.at(location, message, remedy)
    return model


def check_weights(directory: Path) -> None:
    """Compares the weights of a model or an adapter with the checksums in its files, if any.

    Raises:
        CheckpointError: they have been changed, or a file is damaged.
    """
    for path in sorted(directory.glob("*.safetensors")):  # none for a name on the hub
        check_tensors(path)


@contextmanager
def hide_loading_bar() -> Iterator[None]:
    """Hides the progress bar of Transformers within the block, and restores its setting after."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
