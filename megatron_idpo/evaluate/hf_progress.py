"""Loading models with Transformers beside our own progress."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def without_bar() -> Iterator[None]:
    """Within it Transformers shows no bar of its own; after it, as before."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
