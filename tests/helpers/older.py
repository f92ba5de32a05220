"""The older systems' forwards, restated in plain tensor operations from their descriptions.

They read the tensors of the public files by their public names, and nothing of the conversion.
MiniGPT-4: Zhu et al. 2023, MiniGPT-v2: Chen et al. 2023, LiMBeR: Merullo et al. 2023.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]


def _linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def _norm(t: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v by head, [rows, tokens, width] each."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    rows = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return (rows @ v).transpose(1, 2).flatten(2)


def eva(t: Tensors, x: Tensor, blocks: int) -> Tensor:
    """EVA's ViT-g without its last norm, [rows, 1 + patches, width]; heads of 88."""
    weight = t["patch_embed.proj.weight"]
    patches = F.conv2d(x, weight, t["patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    h = torch.cat([t["cls_token"].expand(len(x), -1, -1), patches], dim=1) + t["pos_embed"]
    for b in (f"blocks.{i}" for i in range(blocks)):
        wide = F.linear(_norm(t, f"{b}.norm1", h, 1e-6), t[f"{b}.attn.qkv.weight"])
        q, k, v = wide.chunk(3, dim=-1)
        mixed = _attend(q + t[f"{b}.attn.q_bias"], k, v + t[f"{b}.attn.v_bias"], h.shape[-1] // 88)
        h = h + _linear(t, f"{b}.attn.proj", mixed)
        h = h + _linear(t, f"{b}.mlp.fc2", F.gelu(_linear(t, f"{b}.mlp.fc1", _norm(t, f"{b}.norm2", h, 1e-6))))
    return h


def larger(positions: Tensor, side: int) -> Tensor:
    """Position embeddings for side x side patches: the class token's first, the rest bicubic."""
    old = math.isqrt(positions.shape[1] - 1)
    grid = positions[0, 1:].T.reshape(1, -1, old, old)
    return torch.cat([positions[:, :1], F.interpolate(grid, (side, side), mode="bicubic").flatten(2).mT], dim=1)


def qformer(t: Tensors, image: Tensor, layers: int) -> Tensor:
    """The queries after BLIP-2's Q-Former, [rows, queries, width]: a BERT, heads of 64.

    Every second layer, from the first on, attends to the image.
    """
    queries = t["query_tokens"].expand(len(image), -1, -1)
    h = _norm(t, "Qformer.bert.embeddings.LayerNorm", queries, 1e-12)
    for i in range(layers):
        layer = f"Qformer.bert.encoder.layer.{i}"
        for kind, source in (("attention", None), ("crossattention", image))[: 2 if i % 2 == 0 else 1]:
            read = h if source is None else source
            q, k, v = (
                _linear(t, f"{layer}.{kind}.self.{part}", x)
                for part, x in (("query", h), ("key", read), ("value", read))
            )
            mixed = _linear(t, f"{layer}.{kind}.output.dense", _attend(q, k, v, h.shape[-1] // 64))
            h = _norm(t, f"{layer}.{kind}.output.LayerNorm", mixed + h, 1e-12)
        wide = F.gelu(_linear(t, f"{layer}.intermediate_query.dense", h))
        h = _norm(t, f"{layer}.output_query.LayerNorm", _linear(t, f"{layer}.output_query.dense", wide) + h, 1e-12)
    return h


def minigpt4_image(own: Tensors, tower: Tensors, blip: Tensors, x: Tensor, blocks: int, layers: int) -> Tensor:
    """What the language model reads of an image, [rows, queries, width]."""
    image = _norm(blip, "ln_vision", eva(tower, x, blocks), 1e-5)
    return _linear(own, "llama_proj", qformer(blip, image, layers))


def strips_image(own: Tensors, tower: Tensors, x: Tensor, blocks: int, norm: Tensors | None = None) -> Tensor:
    """The same without a Q-Former: 4 patches that follow each other are one token.

    `ln_vision` is not in any published file of these systems: it stays as it is made, weight 1 and
    bias 0, unless `norm` holds it.
    """
    h = eva(tower, x, blocks)
    norm = norm or {"ln_vision.weight": torch.ones(h.shape[-1]), "ln_vision.bias": torch.zeros(h.shape[-1])}
    patches = _norm(norm, "ln_vision", h, 1e-5)[:, 1:]
    return _linear(own, "llama_proj", torch.cat([patches[:, i::4] for i in range(4)], dim=-1))


def around_image(model, tokenizer, prompt: str, word: str, image: Tensor) -> Tensor:
    """Logits with the image's vectors where the prompt holds `word`, [1, tokens, vocabulary].

    The pieces of the prompt are tokenized one by one, and only the first begins with <s>.
    """
    before, after = prompt.split(word)
    ids = [tokenizer(before).input_ids, tokenizer(after, add_special_tokens=False).input_ids]
    first, last = (model.get_input_embeddings()(torch.tensor([piece], dtype=torch.long)) for piece in ids)
    return model(inputs_embeds=torch.cat([first, image, last], dim=1)).logits


@contextmanager
def lora(model, t: Tensors, alpha: float):
    """Low-rank branches beside the linear maps, y = W x + alpha / r · B (A x), never merged."""
    handles = []
    for name in [name for name in t if name.endswith(".lora_A.weight")]:
        a, b = t[name], t[name.replace("lora_A", "lora_B")]
        module = model.get_submodule(name.removeprefix("llama_model.base_model.model.").removesuffix(".lora_A.weight"))
        branch = lambda module, args, y, a=a, b=b: y + alpha / len(a) * (args[0] @ a.T @ b.T)  # noqa: E731
        handles.append(module.register_forward_hook(branch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def clip_resnet(t: Tensors, x: Tensor) -> Tensor:
    """CLIP's ResNet without its attention pooling, [rows, patches, width].

    Radford et al. 2021. Three convolutions and a mean pooling at the start; blocks that halve the
    grid pool by the mean before their last 1 x 1 convolution. Tensors by timm's names.
    """

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, bn = t[f"{name}.conv.weight"], f"{name}.bn"
        y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var = t[f"{bn}.running_mean"], t[f"{bn}.running_var"]
        return F.batch_norm(y, mean, var, t[f"{bn}.weight"], t[f"{bn}.bias"], eps=1e-5)

    h = conv("stem.conv1", x, stride=2).relu()
    h = F.avg_pool2d(conv("stem.conv3", conv("stem.conv2", h).relu()).relu(), 2)
    for stage in range(4):
        n_blocks = len({name.split(".")[2] for name in t if name.startswith(f"stages.{stage}.")})
        for b in (f"stages.{stage}.{i}" for i in range(n_blocks)):
            pool = 2 if stage > 0 and b.endswith(".0") else 1
            y = conv(f"{b}.conv2_kxk", conv(f"{b}.conv1_1x1", h).relu()).relu()
            y = conv(f"{b}.conv3_1x1", F.avg_pool2d(y, pool))
            h = (y + (conv(f"{b}.shortcut.conv", F.avg_pool2d(h, pool)) if b.endswith(".0") else h)).relu()
    return h.flatten(2).transpose(1, 2)
