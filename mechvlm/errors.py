"""The errors that mechvlm raises for what it was given. Each says what was asked, what is there, and what to do."""


class ModelError(ValueError):
    """The model cannot be loaded, or is not what its architecture record says."""


class InputError(ValueError):
    """An image or a prompt cannot be used."""


class NonFiniteError(ValueError):
    """Activations hold NaN or infinity.

    Attributes:
        examples: the rows of the batch that do.
    """

    def __init__(self, message: str, examples: tuple[int, ...]):
        super().__init__(message)
        self.examples = examples


class ViewError(ValueError):
    """A view cannot be drawn: of results from other inputs, of an image that is gone, or larger than a browser can hold."""


class StoppedError(RuntimeError):
    """Long work stopped half-way, for a reason that lies outside of it. What was done is kept, and it can be gone on with."""


class RemoteError(RuntimeError):
    """A request to NDIF gave no result.

    Attributes:
        retryable: whether the reason lies in the connection or in what the server is busy with, so that the same request may
            succeed later. `mechvlm.ndif.connection.retrying` sends it again.
    """

    def __init__(self, message: str, *, retryable: bool = False):
        super().__init__(message)
        self.retryable = retryable
