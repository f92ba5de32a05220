"""The line that says in a notebook that weights are loaded."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging

from mechvlm.progress import STDERR, StatusLine


@contextmanager
def weights_line(name: str) -> Iterator[None]:
    """In a notebook a line of ours, in place of transformers' own bar, which would be red text.

    Bars of downloads are shown as ever.
    """
    if not STDERR.is_jupyter or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # also those of downloads
    enable_progress_bars()
    try:
        with StatusLine(f"{name}: loading weights"):
            yield
    finally:
        logging.enable_progress_bar()
