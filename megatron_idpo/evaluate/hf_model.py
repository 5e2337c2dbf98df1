"""Loading a Transformers model for evaluation, with every weight checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from megatron_idpo.console.text import format_count
from megatron_idpo.errors import CheckpointError


def load_hf_model(auto_class: Any, path: str, *, location: str, remedy: str, **options: Any) -> Any:
    """Loads a model; weights that are missing from its files are an error.

    Args:
        auto_class: a Transformers class such as `AutoModelForCausalLM`.
        path: directory or hub name.
        location: of errors.
        remedy: of errors.
        options: of `from_pretrained`.

    Raises:
        CheckpointError: it cannot be loaded, or weights are missing, such as the head of a reward
            model in a causal language model.
    """
    try:
        with hide_loading_bar():
            model, info = auto_class.from_pretrained(path, output_loading_info=True, **options)
    # Depending on the files, the library raises almost any type of exception.
    except Exception as error:
        message = f"cannot load {path}: {type(error).__name__}: {error}"
        raise CheckpointError.at(location, message, remedy) from error
    if missing := sorted(info["missing_keys"]):
        message = f"{path} lacks {format_count(len(missing), 'weight')}, first {missing[0]}"
        raise CheckpointError.at(location, message, remedy)
    return model


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
