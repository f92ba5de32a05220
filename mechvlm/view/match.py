"""A view puts a result beside the inputs that it was read from: it is checked that they are of each other."""

import numpy as np
from PIL import Image
from torch import Tensor

from mechvlm.errors import ViewError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.probes.query_reading import QueryReadingResult

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


def _check_models(inputs, lens, norms, reading) -> None:
    given = {"inputs": inputs, "lens": lens, "norms": norms, "reading": reading}
    models = {name: r.model for name, r in given.items() if r is not None and r.model}
    if len(set(models.values())) != 1:
        shown = ", ".join(f"{name} of {model!r}" for name, model in models.items())
        raise ViewError(
            f"Inputs and results are of different models: {shown}. Read them together, mechvlm.read(vlm, inputs, ...)."
        )
    pieces = dict(lens.vocabulary)
    for tokens in inputs.token_maps:
        for i, piece in zip(tokens.ids.tolist(), tokens.strings, strict=True):
            if pieces.get(i, piece) != piece:
                raise ViewError(
                    f"lens was made with another tokenizer than these inputs: token {i} is {pieces[i]!r} there and {piece!r} "
                    f"here. Make the inputs with the model {lens.model!r}, or read these inputs."
                )


def _check_lens(lens: LogitLensResult, tokens: TokenMap, example: int, n: int) -> None:
    held = sorted(set(lens.example.tolist()))
    if example not in held or held[-1] >= n:
        raise ViewError(
            f"lens holds the examples {held}, the inputs 0 to {n - 1}, and example {example} is to be shown."
        )
    positions = lens.of(example).position
    wrong = [p for p in positions.tolist() if p >= len(tokens) or tokens.modality[p] == Modality.PADDING]
    if wrong:
        raise ViewError(
            f"lens is not of these inputs: it read positions {_short(wrong)}, which are no tokens of this example "
            f"({tokens!r}). Read these inputs."
        )
    visual = set(tokens.image.tolist())
    if not visual & set(positions.tolist()):
        raise ViewError(
            f"lens read no visual token of these inputs (positions {_short(positions.tolist())}; visual tokens lie at "
            f"{_short(tokens.image.tolist())}). Read LogitLens(positions='image')."
        )


def _check_norms(norms: NormAttentionResult, tokens: TokenMap, example: int, n: int) -> None:
    _, examples, _, n_src = norms.norm.shape
    if (examples, n_src) != (n, len(tokens)):
        raise ViewError(
            f"norms is not of these inputs: it holds {examples} example(s) of {n_src} tokens, the inputs {n} of {len(tokens)}. "
            "Read these inputs."
        )
    for name, position in zip(norms.names, norms.dest[example].tolist(), strict=True):
        is_last = name in ("last", "last_text", "last_image")
        if is_last and position != getattr(tokens, name):
            raise ViewError(
                f"norms is not of these inputs: {name!r} is position {position} there and {getattr(tokens, name)} here. "
                "Read these inputs."
            )
    if not bool((tokens.modality[norms.dest[example]] != Modality.PADDING).any()):
        raise ViewError(f"norms has no destination that is a token of example {example}.")
    if bool(norms.weight[:, example][..., tokens.modality == Modality.PADDING].any()):
        raise ViewError(
            "norms is not of these inputs: it has weight on positions that are padding here. Read these inputs."
        )


def _maps(reading: QueryReadingResult | None, tokens: TokenMap, example: int, n: int) -> np.ndarray | None:
    if tokens.patches:
        if reading is not None:
            raise ViewError(
                "reading is for models whose visual tokens are queries; here they are patches: leave it out."
            )
        return None
    if reading is None:
        raise ViewError(
            "This model's visual tokens are queries, which have no place on the image: give where each one reads too, "
            "patches(inputs, lens, norms, mechvlm.query_reading(vlm, inputs))."
        )
    grid = tokens.grids[0]
    here, there = (n, len(tokens.image), grid.rows, grid.cols), tuple(reading.weight.shape[1:])
    if here != there:
        raise ViewError(
            f"reading is not of these inputs: [example, query, row, col] is {list(there)} there and {list(here)} here."
        )
    if not bool(reading.weight[:, example].isfinite().all()):
        raise ViewError("reading holds NaN or infinity: there is nothing to draw. Read it again from finite states.")
    return reading.map[example].double().numpy()


def _open(pictures: tuple[Image.Image, ...], tokens: TokenMap, example: int) -> tuple[Image.Image, ...]:
    again = "Make the inputs again from the image file, vlm.inputs(image, prompt)."
    if len(pictures) != len(tokens.grids):
        raise ViewError(
            f"The image of example {example} is gone: these inputs hold {len(pictures)} of {len(tokens.grids)}. {again}"
        )
    for image, grid in zip(pictures, tokens.grids, strict=True):
        try:
            image.load()
            image.getpixel((0, 0))
        except Exception as error:
            raise ViewError(f"The image of example {example} is gone: it cannot be read ({error}). {again}") from error
        if image.size != grid.image_size:
            raise ViewError(
                f"The image of example {example} is {image.size[0]} x {image.size[1]}; the patches were laid on one of "
                f"{grid.image_size[0]} x {grid.image_size[1]}. {again}"
            )
    return pictures


def _short(positions: list[int]) -> str:
    return str(positions) if len(positions) < 6 else f"[{positions[0]}, {positions[1]}, ... {positions[-1]}]"
