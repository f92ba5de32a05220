"""EVA's ViT-g/14, the image tower of BLIP-2, MiniGPT-4 and MiniGPT-v2, as `Blip2VisionModel`.

Published sizes: width 1408, 16 heads of 88, MLP 6144, patches of 14 pixels, 40 blocks, of which
these systems read the first 39. All but the heads' width and the number of blocks is read off the
tensors.
"""

import torch
from tensors import Source
from transformers import Blip2VisionConfig, BlipImageProcessor

BLOCKS = 39
HEAD_WIDTH = 88
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

OUTSIDE = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
}
INSIDE = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.projection": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def tower(
    source: Source, blocks: int, image_size: int | None = None
) -> tuple[Blip2VisionConfig, dict[str, torch.Tensor]]:
    """The tower's settings, and its tensors by their names in `Blip2VisionModel`.

    `post_layernorm` is not among them: it is BLIP-2's `ln_vision`, from another file.

    Args:
        source: eva_vit_g.pth; all of it is accounted for.
        blocks: how many blocks are read.
        image_size: in pixels; None is that of the position embeddings. Others interpolate them.
    """
    names = dict(OUTSIDE)
    for layer in range(blocks):
        old, new = f"blocks.{layer}", f"encoder.layers.{layer}"
        names |= {f"{new}.{n}.{kind}": f"{old}.{o}.{kind}" for n, o in INSIDE.items() for kind in ("weight", "bias")}
        names |= {f"{new}.self_attn.qkv.weight": f"{old}.attn.qkv.weight"}
        names |= {f"{new}.{part}": f"{old}.attn.{part}" for part in ("q_bias", "v_bias")}
    tensors = source.take(names)
    source.leave(rf"blocks\.(?!({'|'.join(map(str, range(blocks)))})\.)", f"the tower is read after {blocks} blocks")
    source.leave(r"(?!blocks\.)", "the original's tower has no such part")
    source.finish()

    for layer in range(blocks):  # queries and values have a bias, keys have none
        q, v = (tensors.pop(f"encoder.layers.{layer}.{part}") for part in ("q_bias", "v_bias"))
        tensors[f"encoder.layers.{layer}.self_attn.qkv.bias"] = torch.cat([q, torch.zeros_like(v), v])
    width, _, _, patch = tensors["embeddings.patch_embedding.weight"].shape
    positions = tensors["embeddings.position_embedding"].float()
    size = image_size or round((positions.shape[1] - 1) ** 0.5) * patch
    tensors["embeddings.position_embedding"] = _at_size(positions, size // patch)
    config = Blip2VisionConfig(
        hidden_size=width, intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.weight"]), num_hidden_layers=blocks,
        num_attention_heads=width // HEAD_WIDTH, image_size=size, patch_size=patch, hidden_act="gelu",
        layer_norm_eps=1e-6, qkv_bias=True,
    )  # fmt: skip
    return config, tensors


def _at_size(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings for a grid of `side` x `side` patches, [1, 1 + side², width].

    The first position, the class token's, stays; the others are interpolated bicubically, as the
    original does when it loads the tower for larger images.
    """
    first, rest = positions[:, :1], positions[:, 1:]
    old = round(rest.shape[1] ** 0.5)
    if old == side:
        return positions
    grid = rest.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


def image_processor(size: int) -> BlipImageProcessor:
    """Images as these systems see them: stretched to a square, bicubic, normed as CLIP's."""
    return BlipImageProcessor(
        size={"height": size, "width": size}, resample=3, image_mean=CLIP_MEAN, image_std=CLIP_STD, do_convert_rgb=True
    )
