"""The paper's three measures: their cost in bare forwards, and the cost of other ways to them.

The floor of a measure is the bare forward plus the matrix products that it cannot do without.
"""

import benchmark_rivals as rivals
import torch
from benchmark_measure import peaks, times
from benchmark_models import QUESTION, build, noise

import mechvlm as mv
from mechvlm.families.record import part
from mechvlm.probes.value_gram import norm_attention_sum, value_gram

BARS = {"Contextualization": 1.05, "LogitLens": 1.08, "NormAttention, 2 rows": 1.10, "all three in one read": 1.15}
"""Largest ratio of a case's time to its floor, for LLaVA and a batch of one."""
ALL_PAIRS_BAR = 1.15
"""The same for norm-based attention of all pairs, at width 2048."""
MEMORY_BAR = 1.25
"""Largest ratio to the bare forward's peak memory, for all three measures in one read."""
TRACING_BAR = 0.03
"""Largest share of a forward that tracing 32 layers may cost."""
LEAST_SPEEDUP = 15
"""Norm-based attention of all pairs is at least this many times as fast as pair by pair."""


class Nothing:
    """A probe that keeps nothing. Reading with it costs the tracing alone."""

    def prepare(self, vlm, inputs):
        return None

    def at_state(self, plan, state):
        return None

    def result(self, plan, rows, vlm, inputs):
        return None


def probes(
    family: str, layers: int, width: int, batch: int, repeats: int, device: str, dtype: torch.dtype
) -> list[dict]:
    """One row per case: seconds, ratios to the bare forward and to the case's floor, peak memory.

    "apart" is the largest difference to mechvlm's numbers, over their largest absolute value.
    """
    vlm, hf = build(family, layers, width, device, dtype)
    inputs = vlm.inputs([noise(i) for i in range(batch)], QUESTION)
    encoding = vlm.encoding(inputs)
    measures: dict[str, rivals.Measures] = {}

    def read(*wanted):
        return lambda: mv.read(vlm, inputs, *wanted)

    def keeping(name, way):
        return name, lambda: measures.update({name: way()})

    @torch.no_grad()
    def bare():
        hf(**encoding, logits_to_keep=1)

    products = _products(hf, vlm, inputs)
    three = "all three in one read"
    ways = {three: lambda: rivals.read(vlm, inputs)}
    if family in ("llava", "instructblip"):  # the others' formulas are written for LLaMA's layers
        bridge = vlm.bridge()
        ways |= {
            "(a) Hugging Face, eager": lambda: rivals.hugging_face(hf, vlm, inputs),
            "(b) TransformerBridge": lambda: rivals.transformer_lens(bridge, vlm, inputs),
            "(d) plain hooks": lambda: rivals.plain_hooks(hf, vlm, inputs),
        }
    cases = {
        "bare forward": bare,
        "empty read": read(Nothing()),
        "Contextualization": read(mv.Contextualization()),
        "LogitLens": read(mv.LogitLens(k=rivals.K)),
        "NormAttention, 2 rows": read(mv.NormAttention()),
        "NormAttention, all pairs": read(mv.NormAttention(dst="all pairs")),
        **dict(keeping(name, way) for name, way in ways.items()),
    }
    if device == "cpu" and batch > 1:
        # A batch of 8 would hold 8 x 620² weights per head and layer, twice: too much for a CPU.
        del cases["NormAttention, all pairs"]
    seconds = times(cases | products, repeats, device, "bare forward")
    memory = peaks(cases, device, min(repeats, 3))
    floor = seconds["bare forward"]
    floors = {"LogitLens": floor + seconds["unembedding product"]}
    floors |= {name: floor + seconds["Gram products"] for name in cases if name.startswith("NormAttention")}
    floors |= {name: floor + sum(seconds[product] for product in products) for name in measures}
    bars = BARS | ({"NormAttention, all pairs": ALL_PAIRS_BAR} if width == 2048 else {})
    bars = bars if family == "llava" and batch == 1 else {}
    rows = []
    for name, taken in seconds.items():
        row = {"case": name, "seconds": taken, "of a bare forward": taken / floor}
        if name in cases:
            row |= {"of its floor": taken / floors.get(name, floor), "bar": bars.get(name)}
            if (peak := memory[name]) and (least := memory["bare forward"]):
                row |= {
                    "peak GB": peak.total / 1e9,
                    "peak of bare": peak.total / least.total,
                    "above MB": peak.above / 1e6,
                }
        if name in measures and name != three:
            row["apart"] = max(
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(measures[name], measures[three], strict=True)
            )
        if name == three and "peak of bare" in row:
            row["memory bar"] = MEMORY_BAR
        rows.append(row)
    return rows + _tracing(floor, repeats, device)


def _products(hf, vlm: mv.VLM, inputs: mv.Inputs) -> dict:
    """The matrix products that no implementation can avoid, on random numbers made beforehand."""
    unembed = part(hf, vlm.record.unembed)
    batch, length = len(inputs), len(inputs.token_maps[0])
    options = {"device": unembed.weight.device, "dtype": unembed.weight.dtype}
    points = torch.randn(sum(len(m.image) for m in inputs.token_maps), vlm.d_model, **options)
    values = torch.randn(batch * length, vlm.d_model, **options)
    weight = part(hf, vlm.record.layers)[0].self_attn.o_proj.weight
    f = torch.randn(batch * length, vlm.n_heads, vlm.d_model, **options)

    @torch.no_grad()
    def unembedding():
        for _ in range(vlm.n_layers + 1):
            unembed(points)

    @torch.no_grad()
    def gram():
        for _ in range(vlm.n_layers):
            values @ weight.T
            f @ f.transpose(-1, -2)

    return {"unembedding product": unembedding, "Gram products": gram}


def _tracing(floor: float, repeats: int, device: str) -> list[dict]:
    """The cost of tracing 32 layers: an empty read minus a bare forward.

    Measured at width 128, where the forward is short enough for the difference to show. Its share
    is that of `floor`, the seconds of the large model's bare forward.
    """
    vlm, hf = build("llava", 32, 128, device)
    inputs = vlm.inputs(noise(0), QUESTION)
    encoding = vlm.encoding(inputs)

    @torch.no_grad()
    def bare():
        hf(**encoding, logits_to_keep=1)

    seconds = times({"bare": bare, "empty": lambda: mv.read(vlm, inputs, Nothing())}, 4 * repeats, device)
    cost = seconds["empty"] - seconds["bare"]
    return [{"case": "tracing 32 layers", "seconds": cost, "of a bare forward": cost / floor, "share bar": TRACING_BAR}]


def pairs(width: int, repeats: int, device: str) -> list[dict]:
    """Norm-based attention of all pairs of one layer: by Gram matrices, and vector by vector (c).

    Both work on the same random tensors.
    """
    heads, n, d_head = width // 128, 620, 128
    torch.manual_seed(0)
    v = torch.randn(1, heads, n, d_head, device=device)
    w_o = torch.randn(width, width, device=device) * 0.02
    scores = torch.randn(1, heads, n, n, device=device)
    alpha = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
    norms = {}
    ours = lambda: norms.update(ours=norm_attention_sum(alpha, value_gram(v, w_o)))  # noqa: E731
    theirs = lambda: norms.update(theirs=rivals.pair_by_pair(alpha, v, w_o))  # noqa: E731
    seconds = times({"ours": ours}, repeats, device) | times({"theirs": theirs}, 1, device)
    apart = float((norms["ours"] - norms["theirs"]).abs().max() / norms["theirs"].max())
    return [
        {"case": "all pairs of a layer, mechvlm", "seconds": seconds["ours"]},
        {
            "case": "(c) all pairs of a layer, vector by vector", "seconds": seconds["theirs"],
            "times as long": seconds["theirs"] / seconds["ours"], "least": LEAST_SPEEDUP, "apart": apart,
        },
    ]  # fmt: skip
