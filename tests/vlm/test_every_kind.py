"""Every public number of a model with adapters, quantized or compiled is that of its plain twin."""

import copy

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.kinds import KINDS, PRECISION, model, plain

pytestmark = pytest.mark.kinds

FAMILY_OF = [(kind, "llava") for kind in KINDS] + [(kind, "instructblip") for kind in ("lora everywhere", "4 bits")]


@pytest.fixture(scope="module", params=FAMILY_OF, ids=" ".join)
def pair(request):
    """(kind, the model, its twin, inputs)."""
    kind, family = request.param
    hf, processor = model(family)
    hf = KINDS[kind](hf)
    twin = plain(hf, kind, family)
    state = {name: copy.deepcopy(value) for name, value in hf.state_dict().items()}
    vlm, other = mv.load(hf, processor), mv.load(twin, processor)
    images = [noise_image(i, (56, 56)) for i in range(2)]
    yield kind, vlm, other, vlm.inputs(images, ["what is this", "a this"])
    after = hf.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in state.items() if type(value) is torch.Tensor)


def weights(vlm, inputs):
    def heads(of):
        return torch.stack([of[layer] for layer in range(vlm.n_layers)])

    by_head = {name: heads(getattr(vlm, name)) for name in ("W_Q", "W_K", "W_V", "W_O")}
    products = {"OV": vlm.OV(1).AB, "QK": vlm.QK(1).AB}
    return by_head | products | {"W_U": vlm.W_U, "W_E": vlm.W_E, "gain": vlm.readout()[0].gain}


def probes(vlm, inputs):
    answered, n_tokens = vlm.answered(inputs, ["a scene", "this"])
    lens, context, norms, attribution = mv.read(
        vlm, inputs, mv.LogitLens(k=1, positions="all"), mv.Contextualization(), mv.NormAttention(dst="last"),
        mv.LogitAttribution("scene", versus="this"),
    )  # fmt: skip
    read = {
        "lens": lens.probs, "tokens": lens.ids, "inter": context.inter, "image": context.image, "norm": norms.norm,
        "value norm": norms.value_norm, "heads": attribution.heads, "mlps": attribution.mlps,
        "total": attribution.total, "logit": attribution.logit,
        "likelihood": mv.read(vlm, answered, mv.Likelihood(n_tokens))[0].total,
    }  # fmt: skip
    return read | ({"queries": mv.query_reading(vlm, inputs).weight} if vlm.cross_attentions else {})


def cache(vlm, inputs):
    logits, activations = vlm.run_with_cache(inputs)
    real = inputs.encoding["attention_mask"].bool()

    def of_tokens(name, value):
        return value.transpose(1, 2)[real] if name.endswith("pattern") else value[real]

    return {"logits": logits[:, -1]} | {name: of_tokens(name, value) for name, value in activations.items()}


def interventions(vlm, inputs):
    last, image = inputs.tokens.last if len(inputs) == 1 else -1, [m.image for m in inputs.token_maps]
    _, held = vlm.run_with_cache(inputs[1], "blocks.1.hook_resid_post")
    changes = {
        "ablate": lambda: mv.ablate(vlm, image, layers=[0, 1], at="z", heads=[0, 2]),
        "patch": lambda: mv.patch(vlm, held["blocks.1.hook_resid_post"][:, -1:], last, layers=1),
        "steer": lambda: mv.steer(vlm, vlm.W_U[:, 7], last, layers=1),
        "knock out": lambda: mv.knock_out(vlm, src=image, dst=last, layers=[1, 2]),
        "reweight": lambda: mv.reweight(vlm, src=image, dst=last, layers=[1, 2], scale=3.0, temperature=0.5),
    }
    changed = {}
    for name, change in changes.items():
        with torch.no_grad(), vlm.trace(inputs):
            change()
            changed[name] = nnsight.save(vlm.logits[:, -1])
    with torch.no_grad(), vlm.trace(inputs):
        vlm.pattern[1] = vlm.pattern[1].flip(1)
        changed["pattern"] = nnsight.save(vlm.logits[:, -1])
    return changed


def experiments(vlm, inputs):
    boxes = [(0, 0, 28, 28), (14, 14, 56, 56)]
    trace = mv.causal_trace(vlm, inputs, "this", groups=["image", "last"])
    flow = mv.information_flow(vlm, inputs, "this", window=1, flows=["image -> last"])
    ablation = mv.object_ablation(vlm, inputs, boxes, "this", margins=(0,), draws=1)
    heads = mv.head_ablation(vlm, inputs, "this", positions="last")
    other = vlm.inputs(noise_image(7, (56, 56)), inputs.prompts[0])
    grid = mv.patch_grid(vlm, inputs[0], other, "this", versus="is", at="z", positions="last")
    return {
        "restored": trace.p_restored, "knocked": flow.p_knocked, "without it": ablation.p_ablated,
        "without heads": heads.p_ablated, "patched heads": grid.m_patched,
    }  # fmt: skip


def neurons(vlm, inputs):
    result = mv.multimodal_neurons(vlm, inputs, "this", k=2)
    return {"neuron": result.index, "attribution": result.attribution, "activation": result.activation}


def bridge(vlm, inputs):
    encoding = vlm.encoding(inputs)
    ids = encoding.pop("input_ids")
    return {"logits": vlm.bridge()(ids, **encoding)[:, -1]}


READS = [weights, probes, cache, interventions, experiments, neurons, bridge]


@pytest.mark.parametrize("read", READS, ids=lambda read: read.__name__)
def test_every_number_is_the_plain_twins(pair, read):
    kind, vlm, twin, inputs = pair
    refusals = {
        "bridge": "which are quantized. Load it without quantization for the bridge" if "bits" in kind else "",
        "neurons": "passes none on: its inputs are quantized too" if "inputs too" in kind else "",
    }
    if message := refusals.get(read.__name__):
        with pytest.raises(mv.ModelError, match=message):
            read(vlm, inputs)
        return
    with torch.no_grad() if read is not neurons else torch.enable_grad():
        got, wanted = read(vlm, inputs), read(twin, inputs)
    off = {name: _difference(got[name], wanted[name]) for name in wanted if got[name].is_floating_point()}
    allowed = PRECISION.get(kind, 1e-4)
    assert {name: d for name, d in off.items() if not d <= allowed} == {}
    if allowed == 1e-4:
        assert all(torch.equal(got[name], wanted[name]) for name in wanted.keys() - off.keys())


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().nan_to_num(), b.detach().nan_to_num()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))


def test_the_same_words_are_written(pair):
    kind, vlm, twin, inputs = pair
    if kind not in PRECISION:
        assert vlm.generate(inputs, 4) == twin.generate(inputs, 4)
        assert torch.equal(vlm.next_tokens(inputs), twin.next_tokens(inputs))


def test_the_kinds_are_no_plain_models(pair):
    """What they show is another weight: a reader of `.weight` would be wrong."""
    kind, vlm, _, _ = pair
    if kind in ("compiled", "lora disabled", "lora merged in place", "norms"):
        return
    o_proj = vlm.layer_parts[2].attn.o_proj if kind != "ia3" else vlm.layer_parts[2].attn.v_proj
    shown = o_proj.weight.data
    computed = vlm.projection("o_proj" if kind != "ia3" else "v_proj", 2).weight
    assert (
        type(shown) is not torch.Tensor or shown.shape != computed.shape or not torch.allclose(shown.float(), computed)
    )
