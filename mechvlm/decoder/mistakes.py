"""Mistakes of the asker, in the asker's words: a layer that is not there, or the wrong moment.

nnsight names the modules of a model, which nobody who reads `vlm.z[5]` has asked for.
"""

import operator
from typing import Any

ORDER = ("resid_pre", "q", "k", "v", "attention", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""A layer's activations in the order in which the model computes them."""


def layer_number(name: str, layer: Any, n_layers: int) -> int:
    """The layer as a number, -n_layers to n_layers - 1.

    Raises:
        TypeError: for anything but one whole number.
        IndexError: for a layer that the decoder does not have.
    """
    there = f"the decoder has layers 0 to {n_layers - 1}"
    try:
        number = operator.index(layer)
    except TypeError:
        several = isinstance(layer, list | tuple | slice | range) or getattr(layer, "ndim", 0) > 0
        advice = f"read several one by one, [{name}[layer] for layer in (2, 3)]" if several else f"{name}[2], say"
        raise TypeError(f"{name}[{layer!r}]: give one layer, a whole number ({there}); {advice}.") from None
    if not -n_layers <= number < n_layers:
        raise IndexError(f"{name}[{number}]: {there}.")
    return number


def require_trace(what: str, envoy: Any) -> None:
    """Refuse to read or assign `what` where no forward of its own model runs.

    In a trace of another model nnsight would give the other's activation: it goes by paths.

    Raises:
        ValueError: when the model of this envoy is not traced now.
    """
    if not envoy.interleaver.interleaving:
        raise ValueError(outside(what))


def outside(what: str) -> str:
    return (
        f"{what} was asked for outside of a trace of its model. There are activations while a forward runs: `with "
        f"vlm.trace(inputs): value = nnsight.save({what})`, and after the block `value` is a tensor."
    )


def reword(error: Exception, what: str) -> None:
    """Give nnsight's error about `what` words that its asker knows; leave another error as it is.

    It stays the same object, to be raised again: nnsight ends a loop over generated tokens with it.
    """
    if type(error).__name__ == "OutOfOrderError":
        _, place, *_ = [*str(error).split("'"), "", ""]
        error.args = (
            f"{what} was asked for after the model had computed it. A trace runs the forward once, so read and assign in "
            f"its order: layer by layer from 0, within a layer {', '.join(ORDER)}, and logits last. (In the model: {place})",
        )
    elif isinstance(error, ValueError) and "outside of interleaving" in str(error):
        error.args = (outside(what),)
