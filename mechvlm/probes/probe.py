"""A probe: a small class that reads a forward as it goes by, and keeps little of it.

`mechvlm.read(vlm, inputs, probe, ...)` runs ONE forward for any number of probes:

1. `plan = probe.prepare(vlm, inputs)`, before the forward: names become positions, bad input is
   refused.
2. Inside the forward, on the model's device, each method that the probe has is called with the
   plan and one reading, and gives a row: a dict of small tensors, or None to keep nothing. The
   plan's tensors are on that device too.

       at_queries(plan, Queried)      each cross-attention of the queries to the image
       at_state(plan, State)          each state, 0 (embeddings) to n_layers
       at_attention(plan, Attended)   each layer's attention to positions
       at_memory(plan, Attended)      each layer's attention to the image's memory, where it has one
       at_writes(plan, Written)       each layer's writes to the residual stream

3. `result = probe.result(plan, rows, vlm, inputs)`, afterwards, with the rows in the order of the
   forward.

Several batches, or a batch that does not fit into memory, are read part by part. Two methods that a
probe may have say how:

    part_of(numbers, n_examples)   the probe for the examples `numbers` (a range) out of n_examples,
                                   where its settings hold something for each example
    join(results)                  one result of those of all parts, in order; without it, results
                                   are joined by `mechvlm.concat`

The smallest probe, the norm of the last position's state:

    class LastNorm:
        def prepare(self, vlm, inputs):
            return [tokens.last for tokens in inputs.token_maps]

        def at_state(self, plan, state):
            return {"norm": state.resid[range(len(plan)), plan].float().norm(dim=-1)}

        def result(self, plan, rows, vlm, inputs):
            return torch.stack([row["norm"].cpu() for row in rows])   # [state example]
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from mechvlm.decoder.attention import Attention
from mechvlm.decoder.norms import Norm
from mechvlm.decoder.unembedding import Unembedding
from mechvlm.families.record import Architecture
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import Answers

READS = ("at_queries", "at_state", "at_attention", "at_memory", "at_writes")
"""The methods with which a probe reads, in the order in which a forward calls them."""

Row = Mapping[str, Tensor]


class State(NamedTuple):
    """The residual stream where it enters a layer; the last state enters the final norm.

    Attributes:
        number: 0 (embeddings) to n_layers. State l is what layer l reads.
        resid: [batch pos d_model].
        final_norm, unembed: the model's own.
    """

    number: int
    resid: Tensor
    final_norm: Norm
    unembed: Unembedding


class Attended(NamedTuple):
    """The attention of one layer, which turns state `layer` into state `layer` + 1.

    Attributes:
        layer: 0 to n_layers - 1.
        parts: the tensors from which the attention is computed. Its sources are positions; in
            `at_memory` they are the vectors of the image's memory.
        w_o: [d_model, head * d_head], the weight by which the heads' outputs reach the residual
            stream, gate and factors included.
        divisor: [batch pos 1], what a norm in between divides each destination's sum by; infinity
            where a position is closed to the memory; None without either.
        shared: what one probe computed of this layer, for the others that read it; empty at first.
    """

    layer: int
    parts: Attention
    w_o: Tensor
    divisor: Tensor | None
    shared: dict[str, Tensor]


class Written(NamedTuple):
    """What one layer writes to the residual stream, from state `layer` to state `layer` + 1.

    Attributes:
        layer: 0 to n_layers - 1.
        z: [batch pos head d_head], the outputs of the heads before W_O.
        attn_out, mlp_out: [batch pos d_model].
        parts: the tensors from which z is computed.
        memory: whether these attend to the image's memory, and to no position.
        w_o, b_o, divisor: [d_model, head * d_head], [d_model] or None, [batch pos 1] or None: how z
            becomes attn_out, (z w_o^T + b_o) / divisor (`mechvlm.decoder.decoder.WritePath`).
        final_norm, unembed: the model's own.
    """

    layer: int
    z: Tensor
    attn_out: Tensor
    mlp_out: Tensor
    parts: Attention
    w_o: Tensor
    b_o: Tensor | None
    final_norm: Norm
    unembed: Unembedding
    divisor: Tensor | None = None
    memory: bool = False


class Queried(NamedTuple):
    """One cross-attention from the queries to the image.

    Attributes:
        number: its place among the cross-attentions, from 0.
        parts: the tensors from which it is computed.
    """

    number: int
    parts: Attention


@runtime_checkable
class Model(Protocol):
    """The part of a `VLM` that probes use."""

    name: str
    record: Architecture
    n_layers: int
    d_vocab: int

    @property
    def memory_layers(self) -> tuple[int, ...]: ...

    @property
    def cross_attentions(self) -> list: ...

    def answer_tokens(self, inputs: Inputs, answers: Answers = None) -> Int[Tensor, " example"]: ...

    def to_str_tokens(self, ids: Int[Tensor, " n"]) -> tuple[str, ...]: ...


class Probe(Protocol):
    """The two methods of every probe; beside them it has one or more of those in `READS`."""

    def prepare(self, vlm: Model, inputs: Inputs) -> Any:
        """Turn the settings into a plan for these inputs, and refuse what cannot be read."""

    def result(self, plan: Any, rows: list[Row], vlm: Model, inputs: Inputs) -> Any:
        """Turn the kept rows into the result."""
