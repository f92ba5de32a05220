"""Other ways to the three measures, which a user could take without mechvlm.

(a) Hugging Face's outputs, (b) TransformerBridge, (c) norm-based attention pair by pair, (d) plain
hooks. (a), (b) and (d) return `Measures`, so that the benchmark can compare their numbers with
mechvlm's.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import mechvlm as mv
from mechvlm.decoder.attention import Attention
from mechvlm.families.record import part
from mechvlm.probes.probe import Attended, State

K = 5


class Measures(NamedTuple):
    """Results of the logit lens (`probs`), contextualization and norm-based attention (`norm`).

    Shapes: probs [layer point k], inter, image and text [layer example], norm
    [layer example dest src].
    """

    probs: Tensor
    inter: Tensor
    image: Tensor
    text: Tensor
    norm: Tensor


def read(vlm: mv.VLM, inputs: mv.Inputs) -> Measures:
    """mechvlm: all three measures in one read."""
    lens, context, norms = mv.read(vlm, inputs, mv.LogitLens(k=K), mv.Contextualization(), mv.NormAttention())
    return Measures(lens.probs, context.inter, context.image, context.text, norms.norm)


@torch.no_grad()
def hugging_face(hf, vlm: mv.VLM, inputs: mv.Inputs) -> Measures:
    """(a) Hugging Face's hidden states and attention weights, then the formulas as printed.

    Eager attention, because only that returns the weights.
    """
    record = vlm.record
    config = part(hf, record.layers)[0].self_attn.config
    before_norm: list[Tensor] = []
    # Hugging Face's last hidden state is already normed, so a hook takes the final norm's input.
    handle = part(hf, record.norm).register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    previous, config._attn_implementation = config._attn_implementation, "eager"
    try:
        out = hf(**vlm.encoding(inputs), output_hidden_states=True, output_attentions=True, logits_to_keep=1)
    finally:
        config._attn_implementation = previous
        handle.remove()
    out = getattr(out, "language_model_outputs", None) or out
    return _by_formulas(hf, vlm, inputs, [*out.hidden_states[:-1], before_norm[0]], list(out.attentions))


@torch.no_grad()
def transformer_lens(bridge, vlm: mv.VLM, inputs: mv.Inputs) -> Measures:
    """(b) TransformerLens' `TransformerBridge.run_with_cache`, then the formulas as printed.

    The cache keeps only the activations that the formulas need.
    """
    encoding = vlm.encoding(inputs)
    last = f"blocks.{vlm.n_layers - 1}.hook_resid_post"
    _, cache = bridge.run_with_cache(
        encoding.pop("input_ids"),
        names_filter=lambda name: name == last or name.endswith(("hook_resid_pre", "attn.hook_pattern")),
        **encoding,
    )
    states = [cache[f"blocks.{layer}.hook_resid_pre"] for layer in range(vlm.n_layers)]
    patterns = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(vlm.n_layers)]
    return _by_formulas(vlm.hf, vlm, inputs, [*states, cache[last]], patterns)


@torch.no_grad()
def plain_hooks(hf, vlm: mv.VLM, inputs: mv.Inputs) -> Measures:
    """(d) PyTorch hooks that call mechvlm's probes, without tracing."""
    record = vlm.record
    layers, norm, unembed = part(hf, record.layers), part(hf, record.norm), part(hf, record.unembed)
    lens, context, norms = probes = mv.LogitLens(k=K), mv.Contextualization(), mv.NormAttention()
    plans = [probe.prepare(vlm, inputs) for probe in probes]
    rows: list[list] = [[], [], []]
    projected: dict[str, Tensor] = {}

    def at_state(number: int, resid: Tensor) -> None:
        for index, probe in enumerate((lens, context)):
            rows[index].append(probe.at_state(plans[index], State(number, resid, norm, unembed)))

    def at_attention(number: int, module, kwargs) -> None:
        q, k, v = (
            projected[name].unflatten(-1, (-1, vlm.d_head)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        parts = Attention(q, k, v, kwargs.get("attention_mask"), module.scaling)
        rows[2].append(norms.at_attention(plans[2], Attended(number + 1, parts, module.o_proj.weight, None, {})))

    handles = []
    for number, layer in enumerate(layers):
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            hook = lambda module, args, out, name=name: projected.update({name: out})  # noqa: E731
            handles.append(getattr(attention, name).register_forward_hook(hook))
        handles += [
            layer.register_forward_pre_hook(lambda module, args, number=number: at_state(number, args[0])),
            attention.register_forward_hook(
                lambda module, args, kwargs, out, number=number: at_attention(number, module, kwargs), with_kwargs=True
            ),
        ]
    handles.append(layers[-1].register_forward_hook(lambda module, args, out: at_state(len(layers), out)))
    try:
        hf(**vlm.encoding(inputs), logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    top, cosines, norm_rows = (
        probe.result(plan, probe_rows, vlm, inputs) for probe, plan, probe_rows in zip(probes, plans, rows, strict=True)
    )
    return Measures(top.probs, cosines.inter, cosines.image, cosines.text, norm_rows.norm)


def pair_by_pair(alpha: Tensor, v: Tensor, w_o: Tensor) -> Tensor:
    """(c) Norm-based attention of all pairs, from the vector of every pair: [batch dest src].

    ‖Σ_h α_h f_h(x_src)‖ from α_h f_h(x_src) [batch head src d_model], one destination at a time.
    The vectors of all destinations of a layer would take 50 GB at width 2048 and 620 tokens.

    Args:
        alpha: attention weights, [batch head dest src].
        v: values, [batch head src d_head].
        w_o: weight of the output projection, [d_model, head * d_head].
    """
    heads = w_o.T.unflatten(0, (v.shape[1], -1))
    f = torch.einsum("bhse,hed->bhsd", v, heads)
    rows = [(alpha[:, :, dest, :, None] * f).sum(1).norm(dim=-1) for dest in range(alpha.shape[2])]
    return torch.stack(rows, 1)


def _by_formulas(hf, vlm: mv.VLM, inputs: mv.Inputs, states: list[Tensor], patterns: list[Tensor]) -> Measures:
    """The three formulas: softmax(norm(h) W_U), 1/(mn) Σ_i Σ_j cos(v_i, w_j), ‖Σ_h α_h f_h(x)‖.

    `states` are the residual streams before each layer and after the last one.
    """
    record = vlm.record
    layers, norm, unembed = part(hf, record.layers), part(hf, record.norm), part(hf, record.unembed)
    maps = inputs.token_maps
    probs, pairs, norms = [], [], []
    for state in states:
        points = torch.cat([state[i, m.image.to(state.device)] for i, m in enumerate(maps)])
        probs.append(unembed(norm(points)).float().softmax(-1).topk(K).values)
        for i, m in enumerate(maps):
            v, w = (normalize(state[i, p.to(state.device)].float(), dim=-1) for p in (m.image, m.text))
            pairs.append(torch.stack([(v @ w.T).mean(), (v @ v.T).mean(), (w @ w.T).mean()]))
    for layer, state, alpha in zip(layers, states[:-1], patterns, strict=True):
        attention = layer.self_attn
        v = attention.v_proj(layer.input_layernorm(state)).unflatten(-1, (-1, vlm.d_head)).transpose(1, 2)
        v = v.repeat_interleave(vlm.n_heads // v.shape[1], dim=1)
        heads = attention.o_proj.weight.T.unflatten(0, (vlm.n_heads, -1))
        f = torch.einsum("bhse,hed->bhsd", v.float(), heads.float())
        rows = []
        for i, m in enumerate(maps):
            a = alpha[i, :, [m.last_text, m.last_image]].float()
            rows.append((a[..., None] * f[i, :, None]).sum(0).norm(dim=-1))
        norms.append(torch.stack(rows))
    inter, image, text = torch.stack(pairs).view(len(states), len(maps), 3).cpu().unbind(-1)
    return Measures(torch.stack(probs).cpu(), inter, image, text, torch.stack(norms).cpu())
