"""W_V W_O and W_Q W_K^T of a layer's heads, as TransformerLens' factored matrices.

TransformerLens is imported when one of these is called: it takes seconds.
"""

from typing import Any

from mechvlm.decoder.decoder import Decoder
from mechvlm.decoder.mistakes import layer_number
from mechvlm.errors import ModelError


def factored_ov(vlm: Decoder, layer: int) -> Any:
    """`VLM.OV`."""
    from transformer_lens import FactoredMatrix

    factors, block = (vlm.W_V[layer], vlm.W_O[layer]), vlm.layer_parts[layer]
    if block.kind.attn_out != block.kind.attention or block.kind.scale != 1 or block.kind.attn_gate:
        raise ModelError(
            f"Between W_O and the residual stream of {vlm.name} stands a norm, a factor or a gate: what a head adds is no "
            "product with W_V W_O. Read vlm.attn_out[layer], or W_V and W_O by themselves."
        )
    return FactoredMatrix(*factors)


def factored_qk(vlm: Decoder, layer: int) -> Any:
    """`VLM.QK`."""
    from transformer_lens import FactoredMatrix

    layer = layer_number("QK", layer, vlm.n_layers)
    if vlm.layer_parts[layer].kind.memory:
        raise ModelError(
            f"Layer {layer} of {vlm.name} attends to the image's memory: W_Q W_K^T is of a state and a vector of the memory, not "
            "of two states. Read vlm.memory_pattern[layer], or W_Q and W_K by themselves."
        )
    factors = vlm.W_Q[layer], vlm.W_K[layer].transpose(-2, -1)
    names = [name for name, _ in vlm.layer_parts[layer].attn._module.named_children() if "norm" in name]
    if names:
        raise ModelError(
            f"The attention of {vlm.name} norms its queries and keys ({', '.join(names)}) after W_Q and W_K: its scores are "
            "no product with W_Q W_K^T. Read vlm.pattern[layer], or W_Q and W_K by themselves."
        )
    return FactoredMatrix(*factors)
