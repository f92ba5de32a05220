"""A model made by hand, in which one head copies the color of one patch into the answer.

Every weight of the decoder and of the vision encoder's layers is 0 but for these:

- A patch's embedding tells how red and how blue it is, and whether it is the patch `PATCH`.
- Head `HEAD` of layer `LAYER` has the same query everywhere, and a key at that patch alone. So all
  later positions attend to it and copy its color.
- The unembedding reads the color: the answer is "red" or "blue".

By construction: no other head, no MLP and no other patch has any effect on the answer.
"""

import torch
from PIL import Image

import mechvlm as mv
from helpers.models import llava

LAYER, HEAD, PATCH = 1, 2, 5
RED, BLUE = "red", "blue"
SHARP = 40.0
"""Score of the patch before the softmax's factor: all other sources get less than 1e-6."""


def copying() -> mv.VLM:
    """A LLaVA of 3 layers, 4 heads of width 8, and 4 x 4 patches of 14 pixels."""
    model, processor = llava.__wrapped__()
    ids = [processor.tokenizer(word, add_special_tokens=False).input_ids[0] for word in (RED, BLUE)]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = "norm" in name.lower() and name.endswith("weight")
            weight.fill_(1.0 if is_norm else 0.0)
        _embed_colors(model)
        decoder = model.model.language_model
        decoder.embed_tokens.weight[:, 3] = 1  # all words are the same, and have no color
        attention, first = decoder.layers[LAYER].self_attn, HEAD * 8
        # The pair of channels (3, 7) turns slowest under the rotary embedding: hardly at all here.
        attention.q_proj.weight[first + 3, 3] = 1
        attention.k_proj.weight[first + 3, 2] = SHARP
        attention.v_proj.weight[first + 0, 0] = 1
        attention.v_proj.weight[first + 1, 1] = 1
        attention.o_proj.weight[0, first + 0] = 1
        attention.o_proj.weight[1, first + 1] = 1
        for channel, token in enumerate(ids):
            model.lm_head.weight[token, channel] = 8
    return mv.load(model, processor)


def _embed_colors(model) -> None:
    """Visual tokens [red, blue, is PATCH, 1, 0 ...]. The vision encoder's layers add nothing."""
    vision = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    pixels = vision.embeddings.patch_embedding.weight  # [width, 3 colors, 14, 14]
    pixels[0, 0], pixels[1, 2] = 3 / 196, 3 / 196
    vision.embeddings.position_embedding.weight[:, 3] = 20  # outweighs the rest in the LayerNorm
    vision.embeddings.position_embedding.weight[PATCH + 1, 2] = 10  # position 0 is the class token
    projector = model.model.multi_modal_projector
    for channel in range(4):
        projector.linear_1.weight[channel, channel] = 1
        projector.linear_2.weight[channel, channel] = 1


def picture(color: str, elsewhere: str = "grey") -> Image.Image:
    """56 x 56 pixels, with the patch `PATCH` in one color and all others in another."""
    image = Image.new("RGB", (56, 56), elsewhere)
    row, col = divmod(PATCH, 4)
    image.paste(color, (14 * col, 14 * row, 14 * col + 14, 14 * row + 14))
    return image
