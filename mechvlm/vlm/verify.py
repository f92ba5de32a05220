"""What a model is held to when it is loaded: one tiny forward, against Hugging Face's own and against itself."""

import nnsight
import torch
from PIL import Image

from mechvlm.decoder.attention import attention_rows
from mechvlm.errors import ModelError
from mechvlm.families.record import part
from mechvlm.vlm.vlm import VLM

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1, torch.float64: 1e-6}
"""Largest difference allowed, relative to the largest entry. Far above rounding, far below a wrong part."""


def check_model(vlm: VLM) -> None:
    """Hold every part that the record names to what the model computes; costs two forwards of one image.

    Raises:
        ModelError: naming everything that is off.
    """
    try:
        inputs = vlm.inputs(Image.new("RGB", (32, 32), "gray"), "a")
    except Exception as error:  # a processor of another model, or with settings missing
        raise ModelError(f"The processor of {vlm.name} does not fit it: {error}") from error
    try:
        got = _forward(vlm, inputs)
    except Exception as error:  # whatever a wrong path leads to, deep inside a trace
        raise ModelError(
            f"{vlm.name} loads as {vlm.record.hf_class}, but cannot be traced by its record in mechvlm/families/known.py: {error}"
        ) from error
    with torch.no_grad():
        out = vlm.hf(**vlm.encoding(inputs), output_hidden_states=True)
    hidden = part(out, vlm.record.decoder_outputs) if vlm.record.decoder_outputs else out

    # W_O itself is claimed to hold the output projection's weight, head by head.
    bias = vlm.projection("o_proj", 0).bias
    with torch.no_grad():
        z_out = torch.einsum("bphe,hed->bpd", got["z"], vlm.W_O[0]) + (0 if bias is None else bias)
    claims = {
        "resid_pre[0] is Hugging Face's hidden_states[0]": (got["resid_pre"], hidden.hidden_states[0]),
        "resid_post[0] is Hugging Face's hidden_states[1]": (got["resid_post"], hidden.hidden_states[1]),
        "logits are Hugging Face's": (got["logits"], out.logits),
        "resid_mid[0] = resid_pre[0] + attn_out[0]": (got["resid_mid"], got["resid_pre"] + got["attn_out"]),
        "resid_post[0] = resid_mid[0] + mlp_out[0]": (got["resid_post"], got["resid_mid"] + got["mlp_out"]),
        "z[0] = pattern[0] v[0]": (got["z"], got["pattern_v"].transpose(1, 2)),
        "attn_out[0] = z[0] W_O[0]": (got["attn_out"], z_out),
        "logits = final norm(resid_post[-1]) W_U": (got["logits"], got["final"] @ vlm.W_U.detach()),
    }
    if vlm.n_layers == 1:  # the last hidden state is normed
        claims.pop("resid_post[0] is Hugging Face's hidden_states[1]")
    off = []
    for claim, (a, b) in claims.items():
        if a.shape != b.shape:
            off.append(f"{claim}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
            continue
        b = b.to(a.device)
        error = float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6))
        if not error <= TOLERANCE.get(a.dtype, 1e-3):
            off.append(f"{claim}: off by {error:.2g} of the largest entry")
    if not all(a.isfinite().all() for pair in claims.values() for a in pair):
        raise ModelError(
            f"{vlm.name} computes NaN or infinity for a plain gray image in {str(vlm.dtype).removeprefix('torch.')}: its "
            "weights are damaged, or overflow in this dtype (try bfloat16 or float32)."
        )
    if off:
        raise ModelError(
            f"{vlm.name} loads as {vlm.record.hf_class}, but is not what its record in mechvlm/families/known.py says:\n- "
            + "\n- ".join(off)
            + "\nAnalyses would be wrong. Mend the record, or pass check=False to look at the model all the same."
        )


def _forward(vlm: VLM, inputs) -> dict[str, torch.Tensor]:
    """Everything that layer 0 computes, and the end of the decoder, in one trace."""
    with torch.no_grad(), vlm.trace(inputs):
        got = nnsight.save({})
        got["resid_pre"] = vlm.resid_pre[0]
        q, k, v, mask, scale = vlm.attention[0]
        got["pattern_v"] = attention_rows(q, k, mask, scale, dtype=v.dtype) @ v.repeat_interleave(
            q.shape[1] // v.shape[1], 1
        )
        got["z"] = vlm.z[0]
        got["attn_out"] = vlm.attn_out[0]
        got["resid_mid"] = vlm.resid_mid[0].clone()
        got["mlp_out"] = vlm.mlp_out[0]
        got["resid_post"] = vlm.resid_post[0]
        got["final"] = vlm.final_norm(vlm.resid_post[-1])
        got["logits"] = vlm.logits
    return got
