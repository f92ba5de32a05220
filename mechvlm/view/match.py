"""Checks that a view's results were read from the inputs that it shows.

A view puts results beside inputs. Models, tokenizers, counts and positions are compared, and a
`ViewError` says where they differ.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mechvlm.errors import ViewError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import POSITION_NAMES, Modality, TokenMap
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.probes.query_reading import QueryReadingResult
from mechvlm.view.drawn import drawn_positions

READ_AGAIN = "Read the result from the inputs that it is shown with."


def check_match(inputs: Inputs, *results) -> None:
    """Refuse results that were not read from these inputs.

    Raises:
        ViewError: when a result comes from another model, has another number of examples, or holds
            positions that these inputs lack.
        TypeError: for an object that is not a result with positions.
    """
    for result in results:
        kind = type(result).__name__
        if not isinstance(result, NormAttentionResult | LogitLensResult | QueryReadingResult):
            known = "NormAttentionResult, LogitLensResult, QueryReadingResult"
            raise TypeError(f"A {kind} cannot be shown on inputs. Give one of: {known}.")
        if inputs.model and result.model != inputs.model:
            raise ViewError(
                f"The {kind} is of the model {result.model!r}, the inputs are of {inputs.model!r}. {READ_AGAIN}"
            )
        for counted, in_result, in_inputs in _counts(inputs, result):
            if in_result != in_inputs:
                raise ViewError(f"The {kind} has {in_result} {counted}, the inputs have {in_inputs}. {READ_AGAIN}")
        if isinstance(result, LogitLensResult):
            _check_positions(inputs, result.example, result.position)
        # With dst="all pairs" every position is a destination, padding too: nothing to compare.
        elif isinstance(result, NormAttentionResult) and len(result.names) != result.norm.shape[-1]:
            example = torch.arange(len(inputs))[:, None].expand_as(result.dest)
            _check_positions(inputs, example.flatten(), result.dest.flatten())


def check_example(inputs: Inputs, example: int) -> int:
    """The number `example`, when the inputs hold it.

    Raises:
        ViewError: when they do not.
    """
    if not 0 <= example < len(inputs):
        raise ViewError(f"Example {example} was asked for; the inputs hold {len(inputs)}: 0 to {len(inputs) - 1}.")
    return example


def load_image(inputs: Inputs, example: int, image: int = 0) -> Image.Image:
    """One original image of an example, with its pixels loaded.

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


def _counts(inputs: Inputs, result) -> list[tuple[str, object, object]]:
    """The counts that must agree, as (what is counted, in the result, in the inputs)."""
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


def _check_positions(inputs: Inputs, example: Tensor, position: Tensor) -> None:
    """Each (example, position) pair of a result must be a token of the inputs, not padding."""
    for e, p in zip(example.tolist(), position.tolist(), strict=True):
        if e >= len(inputs):
            raise ViewError(f"The result holds example {e}, the inputs only {len(inputs)} examples. {READ_AGAIN}")
        tokens = inputs.token_maps[e]
        if p >= len(tokens) or tokens.modality[p] == Modality.PADDING:
            raise ViewError(
                f"The result holds position {p} of example {e}, which is no token of these inputs: they have "
                f"{int(tokens.all[0])} to {len(tokens) - 1}. {READ_AGAIN}"
            )


def check_models(inputs, lens, norms, reading) -> None:
    """Inputs and results must come from one model and one tokenizer.

    Raises:
        ViewError: when they do not.
    """
    sources = {"inputs": inputs, "lens": lens, "norms": norms, "reading": reading}
    models = {name: source.model for name, source in sources.items() if source is not None and source.model}
    if len(set(models.values())) != 1:
        listed = ", ".join(f"{name} of {model!r}" for name, model in models.items())
        raise ViewError(
            f"Inputs and results are of different models: {listed}. Read them together, mechvlm.read(vlm, inputs, ...)."
        )
    vocabulary = dict(lens.vocabulary)
    for tokens in inputs.token_maps:
        for i, piece in zip(tokens.ids.tolist(), tokens.strings, strict=True):
            if vocabulary.get(i, piece) != piece:
                raise ViewError(
                    f"lens was made with another tokenizer than these inputs: token {i} is {vocabulary[i]!r} there and "
                    f"{piece!r} here. Make the inputs with the model {lens.model!r}, or read these inputs."
                )


def check_lens(lens: LogitLensResult, tokens: TokenMap, example: int, n_examples: int) -> None:
    """The lens must hold this example, at tokens of it, with one visual token at least.

    Raises:
        ViewError: when it does not.
    """
    examples = sorted(set(lens.example.tolist()))
    if example not in examples or examples[-1] >= n_examples:
        raise ViewError(
            f"lens holds the examples {examples}, the inputs 0 to {n_examples - 1}: example {example} cannot be shown. "
            "Read the lens from these inputs."
        )
    positions = lens.of(example).position
    wrong = [p for p in positions.tolist() if p >= len(tokens) or tokens.modality[p] == Modality.PADDING]
    if wrong:
        raise ViewError(
            f"lens was not read from these inputs: it holds positions {_shortened(wrong)}, which are no tokens of this "
            f"example ({tokens!r}). Read these inputs."
        )
    visual = drawn_positions(tokens).tolist()
    if not set(visual) & set(positions.tolist()):
        raise ViewError(
            f"lens read no visual token of these inputs (positions {_shortened(positions.tolist())}; visual tokens lie "
            f"at {_shortened(visual)}). Read LogitLens(positions='image')."
        )


def check_norms(norms: NormAttentionResult, tokens: TokenMap, example: int, n_examples: int) -> None:
    """The norms must have the inputs' shape, their named positions and their padding.

    Raises:
        ViewError: when they do not.
    """
    _, examples, _, n_src = norms.norm.shape
    if (examples, n_src) != (n_examples, len(tokens)):
        raise ViewError(
            f"norms was not read from these inputs: it holds {examples} example(s) of {n_src} tokens, the inputs "
            f"{n_examples} of {len(tokens)}. Read these inputs."
        )
    for name, position in zip(norms.names, norms.dest[example].tolist(), strict=True):
        here = _positions_called(name, tokens)
        if here is not None and position not in here:
            raise ViewError(
                f"norms was not read from these inputs: {name!r} is position {position} there and "
                f"{here[0] if here else 'none'} here. Read these inputs."
            )
    if not bool((tokens.modality[norms.dest[example]] != Modality.PADDING).any()):
        raise ViewError(
            f"Every destination of norms is padding in example {example}. Choose destinations that are its tokens."
        )
    if bool(norms.weight[:, example][..., tokens.modality == Modality.PADDING].any()):
        raise ViewError(
            "norms was not read from these inputs: it has weight on positions that are padding here. Read these inputs."
        )


def _positions_called(name: str, tokens: TokenMap) -> list[int] | None:
    """The positions that a destination's name can mean; None for a number or a plain word.

    Where a name means several positions, each is called by its number too: "writing 3".
    """
    group, _, number = name.rpartition(" ")
    meanings = [(name, 0), *([(group, int(number))] if number.isdecimal() else [])]
    named = [meant for meant in meanings if meant[0] in POSITION_NAMES or meant[0].startswith(("wrote:", "holds:"))]
    here = []
    for where, at in named:
        try:
            here += tokens.select(where).tolist()[at : at + 1]
        except ValueError:  # no such positions, or no such word in the answer
            continue
    return here if named else None


def query_maps(
    reading: QueryReadingResult | None, tokens: TokenMap, example: int, n_examples: int
) -> np.ndarray | None:
    """Where each query of the example reads [query, row, col]; None when visual tokens are patches.

    Raises:
        ViewError: when `reading` is missing for queries or given for patches, was read from other
            inputs, or is not finite.
    """
    if tokens.patches:
        if reading is not None:
            raise ViewError(
                "reading is for models whose visual tokens are queries; here they are patches: leave it out."
            )
        return None
    if tokens.layouts[0].grid is None:
        raise ViewError(f"There is no picture to draw on. {tokens.layouts[0].reason}")
    if reading is None:
        raise ViewError(
            "This model's visual tokens are queries, which have no place on the image: also give where each one reads, "
            "patches(inputs, lens, norms, mechvlm.query_reading(vlm, inputs))."
        )
    grid = tokens.grids[0]
    expected, actual = (n_examples, len(tokens.image), grid.rows, grid.cols), tuple(reading.weight.shape[1:])
    if expected != actual:
        raise ViewError(
            f"reading was made from other inputs: [example, query, row, col] is {list(actual)} there and "
            f"{list(expected)} here. Read these inputs."
        )
    if not bool(reading.weight[:, example].isfinite().all()):
        raise ViewError("reading holds NaN or infinity: there is nothing to draw. Read it again from finite states.")
    return reading.map[example].double().numpy()


def load_images(pictures: tuple[Image.Image, ...], tokens: TokenMap, example: int) -> tuple[Image.Image, ...]:
    """The example's images with their pixels loaded, each of the size that its patch grid covers.

    Raises:
        ViewError: when an image is missing, cannot be read, or has another size.
    """
    again = "Make the inputs again from the image file, vlm.inputs(image, prompt)."
    if len(pictures) != len(tokens.layouts):
        raise ViewError(
            f"The image of example {example} is gone: these inputs hold {len(pictures)} of {len(tokens.layouts)}. {again}"
        )
    for image, layout in zip(pictures, tokens.layouts, strict=True):
        try:
            image.load()
            image.getpixel((0, 0))
        except Exception as error:
            raise ViewError(f"The image of example {example} is gone: it cannot be read ({error}). {again}") from error
        if image.size != layout.image_size:
            raise ViewError(
                f"The image of example {example} is {image.size[0]} x {image.size[1]}; the patches were laid on one of "
                f"{layout.image_size[0]} x {layout.image_size[1]}. {again}"
            )
    return pictures


def _shortened(positions: list[int]) -> str:
    return str(positions) if len(positions) < 6 else f"[{positions[0]}, {positions[1]}, ... {positions[-1]}]"
