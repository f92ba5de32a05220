"""Likelihoods, places, interventions, experiments on a family's tiny model; see `every_method`."""

from contextlib import ExitStack

import nnsight
import torch

import mechvlm as mv
from helpers.every_method import ANSWER, Case, changed, close, method
from mechvlm.families.record import part
from mechvlm.tracing.interventions import block_edges


@method
def likelihood(case: Case) -> None:
    texts = ["so it is"] * 3 if case.vlm.record.equal_lengths else ["so it is", "ab", "yes"]
    inputs, lengths = case.vlm.answered(case.inputs, texts)
    (got,) = mv.read(case.vlm, inputs, mv.Likelihood(lengths))
    with torch.no_grad():
        logits = case.twin(**case.vlm.encoding(inputs)).logits.log_softmax(-1)
    for example, n in enumerate(lengths):
        ids = inputs.encoding["input_ids"][example, -n:]
        naive = logits[example, -n - 1 : -1].gather(-1, ids[:, None]).sum()
        assert abs(float(got.total[example] - naive)) < 1e-3


@method
def places(case: Case) -> None:
    """Every visual token of a view has a box on the image; views hold no token twice."""
    for tokens, size in zip(case.inputs.token_maps, case.sizes, strict=True):
        if not tokens.patches:
            raise ValueError(tokens.layouts[0].reason or "Visual tokens are queries, which have no place.")
        views = tokens.views[0]
        assert views[0].grid.image_size == size
        held = torch.cat([view.positions[view.positions >= 0].flatten() for view in views])
        assert len(held) == len(held.unique())
        assert torch.equal(torch.cat([held, tokens.without_place]).sort().values, tokens.image)
        assert set(tokens.pos_in_box((0, 0, *size), covered=0.4).tolist()) <= set(held.tolist())


@method
def knockout(case: Case) -> None:
    """The last position without the image: the twin's weights, those of the image taken out."""
    vlm, at = case.vlm, 1
    if case.memory:
        return _memory_knockout(case)
    sources = [tokens.image for tokens in case.inputs.token_maps]
    with torch.no_grad(), vlm.trace(case.inputs):
        v = nnsight.save(vlm.attention[at].v)
        block_edges(vlm, sources, -1, at, may_be_idle=True)
        z = nnsight.save(vlm.z[at])
    weights = case.seen["attentions"][at][:, :, -1].clone()
    sink = 1 - weights[..., : case.real.shape[1]].sum(-1, keepdim=True)
    weights = weights[..., : case.real.shape[1]]
    for row, where in enumerate(sources):
        weights[row, :, where] = 0
    weights = weights / (weights.sum(-1, keepdim=True) + sink.clamp(min=0))
    values = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
    close(z[:, -1], torch.einsum("bhs,bhse->bhe", weights, values), 1e-3)


def _memory_knockout(case: Case) -> None:
    """The last position without the memory, at all its layers: the twin's attentions write 0."""
    vlm = case.vlm
    with torch.no_grad(), vlm.trace(case.inputs):
        mv.knock_out(vlm, src="memory", dst=-1, layers=vlm.memory_layers)
        logits = nnsight.save(vlm.logits[:, -1])

    def zero(x):
        x[:, -1] = 0
        return x

    with ExitStack() as stack:
        for layer in case.memory:
            stack.enter_context(changed(case.attention_of(layer), zero))
        close(logits, case.run().logits[:, -1])
    assert (logits - case.seen["logits"][:, -1]).abs().max() > 1e-3


@method
def ablation_and_steering(case: Case) -> None:
    """Hugging Face's logits under plain hooks that do the same."""
    vlm, at = case.vlm, 1
    where = [tokens.question if case.memory else tokens.image for tokens in case.inputs.token_maps]
    direction = torch.randn(vlm.d_model, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), vlm.trace(case.inputs):
        mv.ablate(vlm, where, at)
        ablated = nnsight.save(vlm.logits[:, -1])

    def zero(x):
        for row, positions in enumerate(where):
            x[row, positions] = 0
        return x

    with changed(case.layer(at), zero, entering=True):
        close(ablated, case.run().logits[:, -1])
    with torch.no_grad(), vlm.trace(case.inputs):
        mv.steer(vlm, direction, where, at)
        steered = nnsight.save(vlm.logits[:, -1])

    def add(x):
        for row, positions in enumerate(where):
            x[row, positions] += direction
        return x

    with changed(case.layer(at), add, entering=False):
        wanted = case.run().logits[:, -1]
    close(steered, wanted)


@method
def head_ablation(case: Case) -> None:
    vlm, at = case.vlm, 1
    kind, width = vlm.record.kind(at), vlm.layer_parts[at].d_head
    with torch.no_grad(), vlm.trace(case.inputs):
        mv.ablate(vlm, -1, at, at="z", heads=2)
        ablated = nnsight.save(vlm.logits[:, -1])

    def zero(x):
        x[:, -1, 2 * width : 3 * width] = 0
        return x

    with changed(part(case.layer(at), f"{kind.attention}.{kind.o_proj}"), zero, entering=True):
        close(ablated, case.run().logits[:, -1])


def reads_z(case: Case, layer: int) -> torch.nn.Module:
    """The twin's output projection, which z enters."""
    return part(case.layer(layer), f"{case.vlm.record.kind(layer).attention}.{case.vlm.record.kind(layer).o_proj}")


@method
def ablation_of_every_head(case: Case) -> None:
    """Each head by itself, by a plain hook on the twin's output projection."""
    vlm, example = case.vlm, case.inputs[0]
    got = mv.head_ablation(vlm, example, ANSWER, positions="last")
    encoding = vlm.encoding(example)
    for layer in range(vlm.n_layers):
        width = vlm.layer_parts[layer].d_head
        for head in range(vlm.n_heads):

            def zero(x, own=slice(head * width, (head + 1) * width)):
                x[:, -1, own] = 0
                return x

            with torch.no_grad(), changed(reads_z(case, layer), zero, entering=True):
                logits = case.twin(**encoding).logits[0, -1]
            # A single logit may be near 0: it is held to the size of all.
            assert abs(float(got.logit_ablated[layer, head, 0] - logits[ANSWER])) <= 1e-4 * float(logits.abs().max())
            close(got.p_ablated[layer, head, 0], logits.softmax(-1)[ANSWER], 1e-3)


@method
def patch_grid(case: Case) -> None:
    """Two heads of a grey image's forward become the clean ones, by plain hooks on the twin."""
    from PIL import Image

    vlm, example = case.vlm, case.inputs[0]
    blank = vlm.inputs(Image.new("RGB", example.images[0][0].size, (127, 127, 127)), example.prompts[0])
    grid = mv.patch_grid(vlm, example, blank, ANSWER, ANSWER + 1, at="z")
    for layer, head in ((0, 1), (vlm.n_layers - 1, 2)):
        width, kept = vlm.layer_parts[layer].d_head, []
        with torch.no_grad(), changed(reads_z(case, layer), lambda x, kept=kept: kept.append(x) or x, entering=True):
            clean = case.twin(**vlm.encoding(example)).logits[0, -1]

        def put(x, kept=kept, own=slice(head * width, (head + 1) * width)):
            x[..., own] = kept[0].reshape(x.shape)[..., own]
            return x

        with torch.no_grad(), changed(reads_z(case, layer), put, entering=True):
            patched = case.twin(**vlm.encoding(blank)).logits[0, -1]
        for value, logits in ((grid.m_clean[0], clean), (grid.m_patched[layer, head, 0], patched)):
            difference = logits[ANSWER].float() - logits[ANSWER + 1].float()
            assert abs(value - difference) <= 1e-3 * logits.abs().max()


@method
def reweighting(case: Case) -> None:
    """The last position's weights on the question times 3, as the twin's own weights give them."""
    vlm, at = case.vlm, 1
    sources = [tokens.question for tokens in case.inputs.token_maps]
    with torch.no_grad(), vlm.trace(case.inputs):
        v = nnsight.save(vlm.attention[at].v)
        mv.reweight(vlm, sources, -1, at, scale=3.0)
        z = nnsight.save(vlm.z[at])
    weights = case.seen["attentions"][at][:, :, -1].clone()
    sink = 1 - weights[..., : case.real.shape[1]].sum(-1, keepdim=True)
    weights = weights[..., : case.real.shape[1]]
    for row, where in enumerate(sources):
        weights[row, :, where] *= 3
    weights = weights / (weights.sum(-1, keepdim=True) + sink.clamp(min=0))
    values = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
    close(z[:, -1], torch.einsum("bhs,bhse->bhe", weights, values), 1e-3)


@method
def information_flow(case: Case) -> None:
    """Each window as one whole forward."""
    vlm, example = case.vlm, case.inputs[0]
    image = "memory" if case.memory else "image"
    got = mv.information_flow(vlm, example, ANSWER, window=1, flows=[f"{image} -> last", "question -> last"])
    with torch.no_grad(), vlm.trace(example):
        clean = nnsight.save(vlm.logits[0, -1].softmax(-1)[ANSWER])
    close(got.p[0], clean, 1e-3)
    for flow, source in enumerate((image if case.memory else example.tokens.image, example.tokens.question)):
        for layer in range(vlm.n_layers):
            with torch.no_grad(), vlm.trace(example):
                if source != "memory":
                    block_edges(vlm, source, example.tokens.last, layer, may_be_idle=True)
                elif layer in case.memory:
                    vlm.z[layer] = (
                        vlm.z[layer] * (torch.arange(len(example.tokens)) != example.tokens.last)[:, None, None]
                    )
                knocked = nnsight.save(vlm.logits[0, -1].softmax(-1)[ANSWER])
            close(got.p_knocked[flow, layer, 0], knocked, 1e-3)


@method
def causal_trace(case: Case) -> None:
    """A blank image, and the clean states of the last position put back, in whole forwards."""
    vlm, example = case.vlm, case.inputs[0]
    groups = ["question" if case.memory else "image", "last"]
    got = mv.causal_trace(vlm, example, ANSWER, corrupt="blank", window=1, groups=groups)
    from PIL import Image

    blank = vlm.inputs(Image.new("RGB", example.images[0][0].size, (127, 127, 127)), example.prompts[0])
    states = []
    with torch.no_grad(), vlm.trace(example):
        saved = nnsight.save(states)
        for layer in range(vlm.n_layers):
            saved.append(vlm.resid_pre[layer].clone())
    with torch.no_grad(), vlm.trace(blank):
        corrupted = nnsight.save(vlm.logits[0, -1].softmax(-1)[ANSWER])
    close(got.p_corrupt[0], corrupted, 1e-3)
    for group, where in enumerate(map(example.tokens.select, groups)):
        for layer in range(vlm.n_layers):
            with torch.no_grad(), vlm.trace(blank):
                new = vlm.resid_pre[layer].clone()
                new[:, where] = saved[layer][:, where]
                vlm.resid_pre[layer] = new
                restored = nnsight.save(vlm.logits[0, -1].softmax(-1)[ANSWER])
            close(got.p_restored[layer, group, 0], restored, 1e-3)


@method
def object_ablation(case: Case) -> None:
    """The object's tokens become the mean visual token, in one whole forward.

    Queries that a Q-Former reads the image with are those that the twin's weights say.
    """
    vlm, inputs = case.vlm, case.inputs
    boxes = [(0, 0, 30, 22), (10, 10, 40, 50), (0, 0, 50, 30)]
    got = mv.object_ablation(vlm, inputs, boxes, ANSWER, margins=[0], draws=1)
    with torch.no_grad(), vlm.trace(inputs):
        embedded = nnsight.save(vlm.resid_pre[0].clone())
    tokens = [embedded[row, m.image] for row, m in enumerate(inputs.token_maps)]
    mean = torch.cat(tokens).mean(0)
    for row, box in enumerate(boxes):
        if inputs.token_maps[row].patches:
            where = inputs.token_maps[row].pos_in_box(box)
        elif vlm.cross_attentions:
            where = inputs.token_maps[row].image[queries_on(case, row, box)]
        else:
            continue
        assert len(where) == got.n_tokens[0, row] or not len(where)
        if len(where):
            alone = inputs[row]
            offset = len(inputs.token_maps[row]) - len(alone.tokens)
            with torch.no_grad(), vlm.trace(alone):
                new = vlm.resid_pre[0].clone()
                new[:, where - offset] = mean
                vlm.resid_pre[0] = new
                p = nnsight.save(vlm.logits[0, -1].softmax(-1)[ANSWER])
            close(got.p_ablated[0, 0, row], p, 2e-3)


def queries_on(case: Case, row: int, box: tuple[int, int, int, int]) -> torch.Tensor:
    """The quarter of the queries that read a box most, by Hugging Face's own attention weights."""
    record, seen = case.vlm.record, []
    every = part(case.twin.config, record.cross_attention_every)
    layers = list(part(case.twin, record.qformer_layers))[::every]
    handles = [
        part(layer, record.cross_attention).register_forward_hook(lambda module, args, out: seen.append(out[1]))
        for layer in layers
    ]
    case.run()
    for handle in handles:
        handle.remove()
    n = len(case.inputs.token_maps[row].image)
    side = case.twin.config.vision_config.image_size // case.twin.config.vision_config.patch_size
    reading = torch.stack([weights[row, :, :n, -side * side :].mean(0) for weights in seen]).mean(0)
    width, height = case.sizes[row]
    share = torch.zeros(side, side)  # of each patch, covered by the box: the processor squeezes
    for y in range(side):
        for x in range(side):
            left, top, right, bottom = (
                x * width / side,
                y * height / side,
                (x + 1) * width / side,
                (y + 1) * height / side,
            )
            wide, high = min(right, box[2]) - max(left, box[0]), min(bottom, box[3]) - max(top, box[1])
            share[y, x] = max(0, wide) * max(0, high) / ((right - left) * (bottom - top))
    inside = (share >= min(0.5, float(share.max()))).flatten()
    return reading[:, inside].sum(1).topk(max(1, n // 4)).indices


@method
def neurons(case: Case) -> None:
    """Attributions as autograd gives them on the twin."""
    from mechvlm.experiments.multimodal_neurons import attribute_to_neurons

    vlm, acts = case.vlm, []
    tokens = torch.full((3,), ANSWER)
    attribution, _ = attribute_to_neurons(vlm, case.inputs, tokens)
    handles = []
    for layer in range(vlm.n_layers):
        module = part(case.layer(layer), vlm.record.kind(layer).down_proj)

        def keep(_, args):
            args[0].retain_grad()
            acts.append(args[0])

        handles.append(module.register_forward_pre_hook(keep))
    with torch.enable_grad():
        case.twin(**case.encoding).logits[:, -1, ANSWER].sum().backward()
    for handle in handles:
        handle.remove()
    for layer, act in enumerate(acts):
        by_position = (act * act.grad).reshape(*case.real.shape, -1)
        for row, m in enumerate(case.inputs.token_maps):
            close(attribution[row, layer], by_position[row, m.image].sum(0).detach(), 1e-3)
