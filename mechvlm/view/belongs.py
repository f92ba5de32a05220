"""A view puts a result beside the inputs that it was read from: it is checked that they are of each other."""

from PIL import Image
from torch import Tensor

from mechvlm.errors import ViewError
from mechvlm.inputs import Inputs
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.probes.query_reading import QueryReadingResult
from mechvlm.tokens import Modality

AGAIN = "Read the result from the inputs that it is shown with."


def belongs(inputs: Inputs, *results) -> None:
    """Refuse results that were not read from these inputs.

    Raises:
        ViewError: when a result is of another model, another number of examples, or positions that these inputs lack.
        TypeError: for something that is no result with positions.
    """
    for result in results:
        kind = type(result).__name__
        if not isinstance(result, NormAttentionResult | LogitLensResult | QueryReadingResult):
            known = "NormAttentionResult, LogitLensResult, QueryReadingResult"
            raise TypeError(f"A {kind} cannot be shown on inputs; what can: {known}.")
        if inputs.model and result.model != inputs.model:
            raise ViewError(f"The {kind} is of the model {result.model!r}, the inputs are of {inputs.model!r}. {AGAIN}")
        for what, there, asked in _numbers(inputs, result):
            if there != asked:
                raise ViewError(f"The {kind} has {there} {what}, the inputs have {asked}. {AGAIN}")
        if isinstance(result, LogitLensResult):
            _points(inputs, result.example, result.position)
        elif isinstance(result, NormAttentionResult) and len(result.names) != result.norm.shape[-1]:
            example = Tensor.new_tensor(result.dest, range(len(inputs)))[:, None].expand_as(result.dest)
            _points(inputs, example.flatten(), result.dest.flatten())


def example_of(inputs: Inputs, example: int) -> int:
    """The number of an example that is there.

    Raises:
        ViewError: when it is not.
    """
    if not 0 <= example < len(inputs):
        raise ViewError(f"Example {example} was asked for; the inputs hold {len(inputs)}: 0 to {len(inputs) - 1}.")
    return example


def image_of(inputs: Inputs, example: int, image: int = 0) -> Image.Image:
    """An original image of an example, with its pixels still there.

    Raises:
        ViewError: when it was closed or taken out of the inputs.
    """
    again = "Make the inputs again from the image."
    if not image < len(inputs.images[example]):
        raise ViewError(f"Image {image} of example {example} is gone: the inputs no longer hold it. {again}")
    picture = inputs.images[example][image]
    try:
        picture.load()
    except (ValueError, OSError, AttributeError) as error:
        raise ViewError(f"Image {image} of example {example} is gone ({error}). {again}") from error
    return picture


def _numbers(inputs: Inputs, result) -> list[tuple[str, object, object]]:
    """What is counted in both, as (what, in the result, in the inputs)."""
    tokens = inputs.token_maps[0]
    if isinstance(result, NormAttentionResult):
        return [("examples", result.norm.shape[1], len(inputs)), ("positions", result.norm.shape[-1], len(tokens))]
    if isinstance(result, QueryReadingResult):
        _, n_examples, n_queries, rows, cols = result.weight.shape
        grid = tokens.grids[0]
        return [
            ("examples", n_examples, len(inputs)),
            ("queries", n_queries, 0 if tokens.patches else len(tokens.image)),
            ("rows x cols of patches", (rows, cols), (grid.rows, grid.cols)),
        ]
    return []


def _points(inputs: Inputs, example: Tensor, position: Tensor) -> None:
    for e, p in zip(example.tolist(), position.tolist(), strict=True):
        if e >= len(inputs):
            raise ViewError(f"The result holds example {e}, the inputs only {len(inputs)} examples. {AGAIN}")
        tokens = inputs.token_maps[e]
        if p >= len(tokens) or tokens.modality[p] == Modality.PADDING:
            raise ViewError(
                f"The result holds position {p} of example {e}, which is no token of these inputs: they have "
                f"{int(tokens.all[0])} to {len(tokens) - 1}. {AGAIN}"
            )
