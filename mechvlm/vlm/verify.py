"""Checks run on every loaded model: one tiny forward, against Hugging Face's and against itself."""

import nnsight
import torch
from PIL import Image

from mechvlm.decoder.attention import attention_rows
from mechvlm.errors import ModelError
from mechvlm.families.record import part
from mechvlm.vlm.kinds import QUANTIZED_TOLERANCE, TOLERANCE, is_quantized
from mechvlm.vlm.vlm import VLM


def check_model(vlm: VLM) -> None:
    """Compare every part that the record names with what the model computes.

    Costs two forwards of one image. The claims that are checked are those of `claims` below: states
    and logits equal Hugging Face's, the writes of a layer add up to its states, and W_O, W_U and
    the final norm rebuild what the model wrote.

    Raises:
        ModelError: naming everything that is off.
    """
    try:
        inputs = vlm.inputs(Image.new("RGB", (32, 32), "gray"), "a")
    except Exception as error:  # such as a processor of another model, or one that lacks settings
        raise ModelError(f"The processor of {vlm.name} does not fit it: {error}") from error
    try:
        acts = _forward(vlm, inputs)
    except Exception as error:  # a wrong path can raise anything, deep inside a trace
        raise ModelError(
            f"{vlm.name} loads as {vlm.record.hf_class} (language model: {vlm.text_config.model_type}), but cannot be traced by "
            f"its record in mechvlm/families/known.py: {error}"
        ) from error
    with torch.no_grad():
        out = vlm.hf(**vlm.encoding(inputs), output_hidden_states=True)
    hidden = part(out, vlm.record.decoder_outputs) if vlm.record.decoder_outputs else out

    # Rebuilt from W_O, which claims to be the output projection's weight by head.
    bias = vlm.projection("o_proj", 0).bias
    with torch.no_grad():
        z_out = torch.einsum("bphe,hed->bpd", acts["z"], vlm.W_O[0]) + (0 if bias is None else bias)
    claims = {
        "resid_pre[0] is Hugging Face's hidden_states[0]": (acts["resid_pre"], hidden.hidden_states[0]),
        "resid_post[0] is Hugging Face's hidden_states[1]": (acts["resid_post"], hidden.hidden_states[1]),
        "logits are Hugging Face's": (acts["logits"], out.logits),
        "resid_mid[0] = resid_pre[0] + attn_out[0]": (
            acts["resid_mid"],
            acts["resid_pre"] + acts["attn_out"],
        ),
        "resid_post[0] = resid_mid[0] + mlp_out[0]": (
            acts["resid_post"],
            acts["resid_mid"] + acts["mlp_out"],
        ),
        "z[0] = pattern[0] v[0]": (acts["z"], acts["pattern_v"].transpose(1, 2)),
        "attn_out[0] = z[0] W_O[0]": (acts["attn_out"], z_out),
        "logits = final norm(resid_post[-1]) W_U": (acts["logits"], acts["final"] @ vlm.W_U.detach()),
        "final norm(x) = x / rms(x) * its weight": (acts["final"], acts["rms_normed"]),
    }
    if vlm.n_layers == 1:  # Hugging Face's last hidden state comes after the final norm
        claims.pop("resid_post[0] is Hugging Face's hidden_states[1]")
    # Quantized modules round their inputs too, so W_O rebuilds what they wrote less closely.
    least = QUANTIZED_TOLERANCE if is_quantized(vlm.hf) else 0.0
    off = []
    for claim, (a, b) in claims.items():
        if a.shape != b.shape:
            off.append(f"{claim}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
            continue
        b = b.to(a.device)
        difference = float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6))
        if not difference <= max(least, TOLERANCE.get(a.dtype, 1e-3)):
            off.append(f"{claim}: off by {difference:.2g} of the largest entry")
    if not all(a.isfinite().all() for pair in claims.values() for a in pair):
        raise ModelError(
            f"{vlm.name} computes NaN or infinity for a plain gray image in {str(vlm.dtype).removeprefix('torch.')}: its "
            "weights are damaged, or overflow in this dtype (try bfloat16 or float32)."
        )
    if off:
        raise ModelError(
            f"{vlm.name} loads as {vlm.record.hf_class} (language model: {vlm.text_config.model_type}), but is not what its "
            "record in mechvlm/families/known.py says:"
            + "".join(f"\n- {line}" for line in off)
            + "\nAnalyses would be wrong. Correct the record, or pass check=False to look at the model all the same."
        )


def _forward(vlm: VLM, inputs) -> dict[str, torch.Tensor]:
    """Activations of layer 0, and of the end of the decoder, in one trace."""
    with torch.no_grad(), vlm.trace(inputs):
        acts = nnsight.save({})
        acts["resid_pre"] = vlm.resid_pre[0]
        q, k, v, mask, scale = vlm.attention[0]
        acts["pattern_v"] = attention_rows(q, k, mask, scale, dtype=v.dtype) @ v.repeat_interleave(
            q.shape[1] // v.shape[1], 1
        )
        acts["z"] = vlm.z[0]
        acts["attn_out"] = vlm.attn_out[0]
        acts["resid_mid"] = vlm.resid_mid[0].clone()
        acts["mlp_out"] = vlm.mlp_out[0]
        acts["resid_post"] = vlm.resid_post[0]
        final_norm, _ = vlm.readout()
        acts["final"], acts["rms_normed"] = final_norm(vlm.resid_post[-1]), final_norm.in_float32(vlm.resid_post[-1])
        acts["logits"] = vlm.logits
    return acts
