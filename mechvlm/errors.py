"""The errors that mechvlm raises.

Each message says what was asked, what is there, and what to do.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any


class ModelError(ValueError):
    """The model cannot be loaded, or does not match its architecture record."""


class InputError(ValueError):
    """An image or a prompt cannot be used."""


class NonFiniteError(ValueError):
    """Activations hold NaN or infinity.

    Attributes:
        examples: numbers of the examples whose activations hold them, over all batches.
    """

    def __init__(self, message: str, examples: tuple[int, ...]):
        super().__init__(message)
        self.examples = examples


class ViewError(ValueError):
    """A view cannot be drawn.

    Its results come from other inputs, an image is gone, or it is larger than a browser can hold.
    """


class StoppedError(RuntimeError):
    """Long work stopped half-way for an outside reason. What is done is kept and can be resumed."""


class RemoteError(RuntimeError):
    """A request to NDIF gave no result.

    Attributes:
        retryable: whether the connection or the server's load is to blame, so that the request may
            succeed later. `mechvlm.ndif.connection.retrying` sends it again.
    """

    def __init__(self, message: str, *, retryable: bool = False):
        super().__init__(message)
        self.retryable = retryable


def refuse_renamed(**names: str) -> Callable[[Any], Any]:
    """Decorator of a function or a class: an option's earlier name is refused with the present one.

    >>> @refuse_renamed(layers="states")
    ... def logit_lens(states=None): ...
    >>> logit_lens(layers=5)
    TypeError: logit_lens takes states=, not layers=.
    """

    def decorate(target: Any) -> Any:
        call = target.__init__ if isinstance(target, type) else target

        @wraps(call)
        def checked(*args, **kwargs):
            for old in names.keys() & kwargs.keys():
                raise TypeError(f"{target.__name__} takes {names[old]}=, not {old}=.")
            return call(*args, **kwargs)

        if not isinstance(target, type):
            return checked
        target.__init__ = checked
        return target

    return decorate
