"""On a real NDIF server: loading, inputs and every probe give the same as here.

A batch is one small request.
"""

from dataclasses import dataclass

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers.ndif import TOLERANCE, difference, tensor_bytes
from mechvlm.errors import RemoteError

pytestmark = pytest.mark.ndif

PROBES = {
    "logit lens": lambda: mv.LogitLens(),
    "raw logit lens": lambda: mv.LogitLens(k=2, positions="all", states=[0, 3], final_norm=False),
    "contextualization": lambda: mv.Contextualization(subtract_baseline=True),
    "norm attention": lambda: mv.NormAttention(),
    "norm attention, all pairs": lambda: mv.NormAttention(dst="all pairs"),
    "query reading": lambda: mv.QueryReading(),
    "logit attribution": lambda: mv.LogitAttribution("red", "blue"),
    "shares of weights": lambda: mv.AttentionShare(("last", "last_image")),
    "shares of norms": lambda: mv.AttentionShare(of="norm"),
    "localization heads": lambda: mv.LocalizationHeads(),
}
OVERHEAD = 5_000
"""Bytes of a result beside its tensors: names, shapes and alignment, some hundred a layer."""


def test_the_server_cannot_import_mechvlm(pair):
    """Otherwise a function that does not travel would go unnoticed."""

    def ask():
        with pair.there.trace(pair.inputs):
            import mechvlm.vlm.vlm

            nnsight.save(mechvlm.vlm.vlm.__name__)

    with pytest.raises(RemoteError, match="No module named 'mechvlm'"):
        ask()


def test_no_weights_are_loaded(pair):
    there, here = pair.there, pair.here
    assert {p.device.type for p in there.hf.parameters()} == {"meta"}
    for name in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_vocab", "record", "name"):
        assert getattr(there, name) == getattr(here, name)
    assert "on NDIF" in repr(there)


def test_the_server_says_its_dtype(pair, traffic):
    """The bundled models are stored in float16, and this server runs in float32."""
    there = mv.load(pair.there.name, remote=True)
    assert there.dtype == there.dtype == torch.float32
    assert traffic.requests == 1


@pytest.mark.parametrize("name", PROBES)
def test_probes(pair, user, traffic, name):
    """The same to 1e-5, by one request that brings back no more than the result holds."""
    probe = PROBES[name]()
    if name == "query reading" and pair.there.record.visual_tokens == "patches":
        with pytest.raises(ValueError, match="has no queries"):
            mv.read(pair.there, pair.inputs, probe)
        assert traffic.requests == 0
        return
    if name == "localization heads" and pair.there.record.visual_tokens != "patches":
        with pytest.raises(ValueError, match="quer"):
            mv.read(pair.there, pair.inputs, probe)
        return
    (there,) = mv.read(pair.there, pair.inputs, probe)
    (here,) = mv.read(pair.here, pair.inputs, probe)
    assert difference(there, here) <= TOLERANCE
    assert traffic.requests == 1
    states = (pair.there.n_layers + 1) * len(pair.inputs) * len(pair.inputs.token_maps[0]) * pair.there.d_model * 4
    limit = tensor_bytes(there) + OVERHEAD
    if name == "localization heads":  # the maps travel, and their entropy is computed here
        limit = states / 4
    assert traffic.received[0] < limit, (traffic.received, limit)
    assert name.endswith("all pairs") or traffic.received[0] < states / 4


def test_many_probes_are_one_request(pair, user, traffic):
    # Queries have no places, and patches no Q-Former.
    without = "query reading" if pair.there.record.visual_tokens == "patches" else "localization heads"
    probes = [make() for name, make in PROBES.items() if name not in (without, "query reading")]
    there, here = mv.read(pair.there, pair.inputs, *probes), mv.read(pair.here, pair.inputs, *probes)
    assert difference(there, here) <= TOLERANCE
    assert traffic.requests == 1


@dataclass(frozen=True)
class Norms:
    """A user's own probe."""

    power: int = 2
    reads = frozenset({"states"})

    def prepare(self, vlm, inputs):
        return inputs.token_maps[0].last

    def at_state(self, plan, state):
        return {"norm": self.of(state.resid[:, plan])}

    def of(self, x):
        return x.abs().pow(self.power).sum(-1)

    def result(self, plan, rows, vlm, inputs):
        return torch.stack([row["norm"].cpu() for row in rows])


def test_a_users_own_probe(pair, user):
    (there,), (here,) = mv.read(pair.there, pair.inputs, Norms()), mv.read(pair.here, pair.inputs, Norms())
    assert there.shape == (pair.there.n_layers + 1, 3)
    assert float(((there - here) / here).abs().max()) <= TOLERANCE


def test_trace(pair, user, traffic):
    """An ordinary trace, whose block names the inputs' positions and the weights."""

    def run(vlm):
        inputs = pair.inputs[0]
        with torch.no_grad(), vlm.trace(inputs):
            values = nnsight.save(
                [
                    vlm.q[2],
                    vlm.pattern[2, [inputs.tokens.last]],
                    vlm.resid_mid[2].clone(),
                    vlm.W_O[2],
                    vlm.resid_post[-1],
                    vlm.W_U[:, 7],
                    vlm.W_E[:3],
                    vlm.logits,
                ]
            )
        return values

    assert difference(run(pair.there), run(pair.here)) <= TOLERANCE
    assert traffic.requests == 1


def test_weights_are_not_here(pair):
    there = pair.there
    for read_weight in (
        lambda: there.W_U,
        lambda: there.W_E,
        lambda: there.W_O[0],
        lambda: there.OV(0),
        lambda: there.bridge(),
    ):
        with pytest.raises(mv.ModelError, match="no weights are here"):
            read_weight()


@torch.no_grad()
def decorated(x):
    return plain(x)


def plain(x):
    return x.sum()


def test_a_users_own_functions(pair, user, traffic):
    """Plain functions travel with those that they call; a decorated one is refused unsent."""

    def ask(vlm, function):
        with torch.no_grad(), vlm.trace(pair.inputs):
            value = nnsight.save(function(vlm.resid_post[0]))
        return value

    assert difference(ask(pair.there, plain), ask(pair.here, plain)) <= 1e-3
    assert traffic.requests == 1
    with pytest.raises(TypeError, match=r"decorated is decorated with @torch.no_grad\(\), which does not travel"):
        ask(pair.there, decorated)
    assert traffic.requests == 1


def test_options_that_the_server_decides(server):
    with pytest.raises(mv.ModelError, match="decides about dtype, device"):
        mv.load("tiny-llava", remote=True, dtype="float16", device="cpu")
    with pytest.raises(mv.ModelError, match="remote='ndif'"):
        mv.load("tiny-llava", remote="ndif")
