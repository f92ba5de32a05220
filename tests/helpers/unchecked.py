"""Calls as in a user's process, where nothing checks annotations."""

from contextlib import contextmanager

import jaxtyping


@contextmanager
def unchecked():
    """Without the tests' check of annotations, so that mechvlm's own error is seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
