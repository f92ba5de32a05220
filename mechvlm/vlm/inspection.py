"""What `mechvlm check` says of a model: its record, derived anew, and how each claim came out."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from mechvlm.decoder.decoder import Gates
from mechvlm.errors import ModelError
from mechvlm.families.derive import derive
from mechvlm.families.record import Architecture, LayerKind
from mechvlm.inputs.views import MEMORY
from mechvlm.vlm.closeness import describe
from mechvlm.vlm.loading import load
from mechvlm.vlm.records import blank_record, example_arguments
from mechvlm.vlm.verify import Claims, check_claims, holds, own_forward, source_of
from mechvlm.vlm.vlm import VLM

DERIVED = "Derived from the model, as a record for mechvlm/families/known.py:"


@dataclass(frozen=True)
class Inspection:
    """What was found out of a model.

    Attributes:
        vlm: the model.
        derived: its record, derived from its numbers; of a model with a memory, the known one.
        claims: by how much each claim on the record in use is off.
        visual: what its visual tokens are, in words.
    """

    vlm: VLM
    derived: Architecture
    claims: Claims
    visual: str

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(holds(difference, self.vlm) for difference in self.claims.values())

    def _by_kind(self) -> dict[str, list[str]]:
        """The claims of all layers that say the same, by what they say of layer l."""
        kinds: dict[str, list[str]] = {}
        for claim in self.claims:
            numbers = [int(number) for number in re.findall(r"\[(\d+)\]", claim)]
            named = claim.replace(f"[{numbers[0]}]", "[l]") if numbers else claim
            named = re.sub(r"\[\d+\]", "[l - 1]", named) if numbers and "Hugging Face" not in claim else claim
            kinds.setdefault(named, []).append(claim)
        return kinds

    def text(self) -> str:
        """All of it, as lines for a terminal."""
        vlm = self.vlm
        lines = [
            f"{vlm.name}: {vlm.record.hf_class} with {vlm.n_layers} layers, read by {source_of(vlm)}.",
            f"Visual tokens: {self.visual}",
            "",
            *(f"Gates of layer {layer}: {_gate_text(gates)}" for layer, gates in vlm.gates.items()),
            "The known record:" if vlm.memory_layers else DERIVED,
            *record_lines(self.derived),
            "",
            "Identities (the largest difference, of the largest entry):",
        ]
        for claim, worst in self._by_kind().items():
            differences = [self.claims[name] for name in worst]
            difference = max(differences, key=lambda x: (x != x, x))
            mark = "ok  " if holds(difference, vlm) else "FAIL"
            layers = f" ({len(worst)} layers)" if len(worst) > 1 else ""
            lines.append(f"  {mark} {describe(difference):<40} {claim}{layers}")
        verdict = (
            "Every identity holds." if self.holds else "Not every identity holds: what depends on it would be wrong."
        )
        return "\n".join([*lines, "", verdict])


def inspect_model(model: Any, processor: Any = None, **options: Any) -> Inspection:
    """Load a model, derive its record and hold it to what the model computes.

    >>> print(inspect_model("tiny-llava").text())

    Args:
        model: as `mechvlm.load` takes it.
        processor: likewise.
        **options: likewise.

    Raises:
        ModelError: for a model that cannot be loaded, or of which no record can be derived.
    """
    vlm = load(model, processor, check=False, **options)
    if not vlm.has_weights:
        raise ModelError(f"{vlm.name} runs on NDIF: a record is derived where the weights are.")
    record = blank_record(vlm.hf)
    # One forward shows no gates and masks: the record of a memory is known, and not derived.
    is_memory = record.visual_tokens == "memory"
    derived = vlm.record if is_memory else derive(vlm.hf, example_arguments(vlm.hf, vlm.processor, record), record)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    inputs = vlm.inputs(Image.fromarray(pixels), "What is it?")
    return Inspection(vlm, derived, check_claims(vlm, inputs, own_forward(vlm, inputs)), _visual(inputs.tokens))


def _visual(tokens: Any) -> str:
    if tokens.is_memory:
        return f"none. {MEMORY}"
    n = len(tokens.image)
    if not tokens.patches:
        return f"{n} for an image of 64 x 48. {tokens.layouts[0].reason or 'Queries, which have no place on it.'}"
    views = ", ".join(f"{view.name} {view.rows} x {view.cols}" for view in tokens.views[0])
    lost = len(tokens.without_place)
    return f"{n} for an image of 64 x 48: {views}" + (f"; {lost} without a place." if lost else ".")


def _gate_text(gates: Gates) -> str:
    """A layer's gates in words; of one for each dimension, the mean size."""
    each = ", mean size over dimensions" if len(gates.attn) > 1 else ""
    attn, mlp = (gate.abs().mean() if len(gate) > 1 else gate[0] for gate in gates)
    return f"attention {float(attn):.3f}, MLP {float(mlp):.3f} (tanh{each}; 0 is closed)."


def record_lines(record: Architecture) -> Iterator[str]:
    """A record as it is written in Python, without the fields that have their usual values."""
    yield "  Architecture("
    for field in fields(Architecture):
        value = getattr(record, field.name)
        if field.name == "kinds":
            yield f"      kinds=({' '.join(f'{kind_text(kind)},' for kind in value)}),"
        elif field.name != "derived" and (field.default is MISSING or value != field.default):
            yield f"      {field.name}={value!r},"
    yield "  )"


def kind_text(kind: LayerKind) -> str:
    """A `LayerKind` as it is written in Python, without the fields that a Llama layer shares."""
    usual = LayerKind()
    own = [
        f"{field.name}={getattr(kind, field.name)!r}"
        for field in fields(LayerKind)
        if getattr(kind, field.name) != getattr(usual, field.name)
    ]
    return f"LayerKind({', '.join(own)})"
