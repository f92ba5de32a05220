"""Checks run on every loaded model: what its record claims, against what it computes.

1. One trace of a tiny prompt reads every layer: each must read what the one before it returned. One
   layer of each build is looked into. Claims are compared inside the trace, so that nothing large
   is kept.
2. One forward of Hugging Face's own gives states and logits to compare with.
3. For a record that is not a known one, the decoder's own call is made again, with two rows: its
   logits must be those of the first forward. Experiments start from such a call. And an example in
   a batch must be what it is alone; where padding changes it, batches of one length must do.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import nnsight
import torch
from PIL import Image
from torch import Tensor

from mechvlm.decoder.attention import attention_rows
from mechvlm.decoder.layer import Layer
from mechvlm.decoder.replay import recorded, repeated
from mechvlm.errors import ModelError
from mechvlm.families.known import known_record
from mechvlm.families.record import layer_paths, part
from mechvlm.inputs.batch import Inputs
from mechvlm.vlm.closeness import TOLERANCE, describe, difference_of
from mechvlm.vlm.kinds import QUANTIZED_TOLERANCE, is_quantized
from mechvlm.vlm.processors import foreign_types, unfit, usual_processor
from mechvlm.vlm.vlm import VLM

Claims = dict[str, float]
"""Each claim, and by how much of the largest entry its two sides differ."""


def check_model(vlm: VLM) -> None:
    """Compare every part that the record names with what the model computes.

    Costs two forwards of one image; five for a record that is not a known one.

    Raises:
        ModelError: naming everything that is off.
    """
    if foreign := foreign_types(vlm.processor, vlm.config):
        raise ModelError(
            f"{vlm.name} is a model of the type {vlm.config.model_type}, and its {type(vlm.processor).__name__} that of "
            f"{', '.join(foreign)}, which prepares images and prompts otherwise. Give the processor that was saved with the "
            f"model{usual_processor(vlm.config)}; or pass check=False to read the model with this one all the same."
        )
    try:
        inputs = vlm.inputs(Image.new("RGB", (32, 32), "gray"), "a")
    except Exception as error:  # such as a processor of another model, or one that lacks settings
        reason = f"it returns no {error}." if isinstance(error, KeyError) else error
        raise ModelError(f"The processor of {vlm.name} does not fit it: {reason}") from error
    loaded = f"{vlm.name} loads as {vlm.record.hf_class} (language model: {vlm.text_config.model_type})"
    theirs = own_forward(vlm, inputs)
    try:
        claims = check_claims(vlm, inputs, theirs)
    except Exception as error:  # a wrong path can raise anything, deep inside a trace
        raise ModelError(f"{loaded}, but cannot be traced by {source_of(vlm)}: {error}") from error
    if any(difference != difference for difference in claims.values()):
        raise ModelError(
            f"{vlm.name} computes NaN or infinity for a plain gray image in {str(vlm.dtype).removeprefix('torch.')}: its "
            "weights are damaged, or overflow in this dtype (try bfloat16 or float32)."
        )
    if off := [
        f"{claim}: {describe(difference)}" for claim, difference in claims.items() if not holds(difference, vlm)
    ]:
        raise ModelError(
            f"{loaded}, but is not what {source_of(vlm)} says:"
            + "".join(f"\n- {line}" for line in off)
            + f"\nThe other {len(claims) - len(off)} of {len(claims)} claims hold (mechvlm check lists them)."
            + "\nAnalyses would be wrong. Correct the record, or pass check=False to look at the model all the same."
        )
    if vlm.record.derived:
        even, uneven = (_in_a_batch(vlm, inputs, theirs.logits, prompt) for prompt in ("a", "a red cup on the table"))
        if not holds(even, vlm):
            raise ModelError(
                f"{loaded}, but computes something else of an example in a batch than of the example alone "
                f"({describe(even)}): this version of transformers mixes the examples of its batches."
            )
        if not holds(uneven, vlm):
            vlm.record = replace(vlm.record, equal_lengths=True)


def _in_a_batch(vlm: VLM, inputs: Inputs, logits: Tensor, prompt: str) -> float:
    """How far an example behind another one, with another prompt, is from the example alone."""
    (image,) = inputs.images[0]
    both = vlm.inputs([Image.new("RGB", image.size, "navy"), image], [prompt, *inputs.prompts])
    return difference_of(own_forward(vlm, both).logits[1:, -logits.shape[1] :], logits)


def source_of(vlm: VLM) -> str:
    """The model's record in words, for messages."""
    if vlm.record.derived:
        return "its derived record"
    return (
        "its record in mechvlm/families/known.py" if vlm.record == known_record(vlm.hf) else "the record that was given"
    )


def own_forward(vlm: VLM, inputs: Inputs) -> Any:
    """What Hugging Face's own forward gives, with all its states.

    Raises:
        ModelError: when it fails on what the processor made.
    """
    try:
        with torch.no_grad():
            return vlm.hf(**vlm.encoding(inputs), output_hidden_states=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a forward can raise anything
        raise unfit(vlm.hf, vlm.processor, vlm.name, error) from error


def check_claims(vlm: VLM, inputs: Inputs, out: Any) -> Claims:
    """How far apart the two sides of each claim are, relative to the largest entry.

    NaN where a side is not finite; infinity where the shapes differ. `out` is what `own_forward`
    gives of the same inputs.
    """
    ends, claims, chosen = {}, {}, _one_of_each_build(vlm)
    # Hugging Face numbers no gated blocks: its states begin after one that stands first.
    numbered = layer_paths(vlm.record, vlm.model).index(f"{vlm.record.layers}.0")
    with torch.no_grad(), vlm.trace(inputs):
        claims = nnsight.save({})
        ends = nnsight.save({})
        ends["call"] = part(vlm.model, vlm.record.decoder).inputs
        for block in vlm.layer_parts:
            for claim, a, b in _handed_on(vlm, block, ends, inputs):
                claims[claim] = difference_of(a, b)
            if block.number == numbered:
                ends["first"] = ends["pre"].clone()
            if block.number in chosen:
                for claim, a, b in _claims_of(vlm, block, ends):
                    claims[claim] = difference_of(a, b)
            ends["post"] = vlm.resid_post[block.number]
            if block.number == numbered:
                ends["first_post"] = ends["post"].clone()
        norm, unembed = vlm.readout()
        final = norm(ends["post"])
        claims["final norm(x) = x / rms(x) * its gain + its bias"] = difference_of(final, norm.in_float32(ends["post"]))
        ends["rebuilt"] = unembed.logits_of(final @ unembed.weight.T + (0 if unembed.bias is None else unembed.bias))
        ends["logits"] = vlm.logits
    hidden = (part(out, vlm.record.decoder_outputs) if vlm.record.decoder_outputs else out).hidden_states
    if hidden:
        claim = f"resid_pre[{numbered}] is Hugging Face's hidden_states[0]"
        claims[claim] = difference_of(ends["first"], hidden[0])
        # Hugging Face's last hidden state comes after the final norm.
        if vlm.n_layers > 1 and not vlm.record.adds_between:
            claim = f"resid_post[{numbered}] is Hugging Face's hidden_states[1]"
            claims[claim] = difference_of(ends["first_post"], hidden[1])
    claims["logits are Hugging Face's"] = difference_of(ends["logits"], out.logits)
    claims["logits = final norm(resid_post[-1]) W_U"] = difference_of(ends["rebuilt"], out.logits)
    if vlm.record != known_record(vlm.hf):
        claims["logits of the decoder's own call, made again for two rows"] = _replayed(vlm, ends, out.logits)
    return claims


def _one_of_each_build(vlm: VLM) -> set[int]:
    """The first layer of each build, and the last layer of all."""
    first: dict[tuple, int] = {}
    for block in vlm.layer_parts:
        parts = tuple(type(module).__name__ for module in block.envoy._module.modules())
        window = getattr(block.attn._module, "sliding_window", None) if block.kind.attention else None
        first.setdefault((block.kind, parts, window), block.number)
    return {*first.values(), vlm.n_layers - 1}


def _handed_on(vlm: VLM, block: Layer, ends: dict, inputs: Inputs) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Inside the trace: that a layer reads what the one before it returned."""
    ends["pre"] = pre = vlm.resid_pre[block.number]
    if block.number:
        chosen = _without_image(inputs) if vlm.record.adds_between else slice(None)
        claim = f"resid_pre[{block.number}] = resid_post[{block.number - 1}]"
        yield claim, pre[:, chosen], ends["post"][:, chosen]


def _claims_of(vlm: VLM, block: Layer, ends: dict) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Inside the trace: (claim, left, right) of one layer, in the order of its forward."""
    layer, kind, pre = block.number, block.kind, ends["pre"]
    if kind.attention is not None:
        v = None if kind.v_proj is None else vlm.v[layer]
        parts = vlm.memory_attention[layer] if kind.memory else vlm.attention[layer]
        z = vlm.z[layer]
        values = parts.v.repeat_interleave(parts.q.shape[1] // parts.v.shape[1], 1)
        if v is not None:
            yield f"v[{layer}] are the values of the attention", v.transpose(1, 2), parts.v
        weighted = (attention_rows(parts, dtype=parts.v.dtype) @ values).transpose(1, 2)
        pattern = "memory_pattern" if kind.memory else "pattern"
        yield f"z[{layer}] = {pattern}[{layer}] v[{layer}]", z, weighted
        w_o, b_o, divisor = vlm.write_path(layer)
        written = z.flatten(2) @ w_o.T + (0 if b_o is None else b_o)
        written = written if divisor is None else (written / divisor).to(written.dtype)
        yield f"attn_out[{layer}] = z[{layer}] W_O[{layer}]", vlm.attn_out[layer], written
    attn_out = vlm.attn_out[layer]
    if kind.mid_norm is not None:
        mid = vlm.resid_mid[layer].clone()
        yield f"resid_mid[{layer}] = resid_pre[{layer}] + attn_out[{layer}]", mid, pre + attn_out
    else:
        mid = pre + attn_out
    mlp_out, post = vlm.mlp_out[layer], vlm.resid_post[layer]
    before = f"resid_mid[{layer}]" if kind.mid_norm is not None else f"resid_pre[{layer}] + attn_out[{layer}]"
    yield f"resid_post[{layer}] = {before} + mlp_out[{layer}]", post, mid + mlp_out


def _without_image(inputs: Inputs) -> Tensor:
    """The positions without visual tokens, at which no image features are added."""
    tokens = inputs.tokens
    return torch.isin(torch.arange(len(tokens)), tokens.image, invert=True)


def _replayed(vlm: VLM, ends: dict, logits: Tensor) -> float:
    decoder = part(vlm.hf, vlm.record.decoder)
    call = repeated(recorded(decoder, *ends["call"]), 2)
    with torch.no_grad(), part(vlm.model, vlm.record.decoder).trace(**call):
        again = nnsight.save(vlm.unembed(vlm.final_norm(vlm.resid_post[vlm.n_layers - 1])))
    return difference_of(again, logits.expand(2, -1, -1))


def holds(difference: float, vlm: VLM) -> bool:
    """Whether the two sides of a claim are as close as the model's dtype allows."""
    # Quantized modules round their inputs too, so W_O rebuilds what they wrote less closely.
    least = QUANTIZED_TOLERANCE if is_quantized(vlm.hf) else 0.0
    return difference <= max(least, TOLERANCE.get(vlm.dtype, 1e-3))
