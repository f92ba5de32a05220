"""MiniGPT-v2 for transformers: LLaVA with BLIP-2's image tower, and 4 neighbours in a token.

transformers 5 has no class that joins 4 patches of a row: its classes join squares of 2 x 2. This
file is written beside the weights; with it the folder loads by

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

The tokens of an image with 32 x 32 patches: 8 from each row, each 4 patches wide and 1 high.
"""

import torch
from torch import nn
from transformers import AutoModel, Blip2VisionConfig, Blip2VisionModel, LlavaConfig, LlavaForConditionalGeneration

AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)


class MiniGPTv2Config(LlavaConfig):
    model_type = "minigpt_v2"


class Strips(nn.Module):
    """Norm each patch, join 4 in a row, map them: [rows, 4n, width] to [rows, n, out]."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.ln_vision = nn.LayerNorm(width, eps=1e-5)
        self.linear = nn.Linear(4 * width, out)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.linear(self.ln_vision(patches).unflatten(1, (-1, 4)).flatten(2))


class MiniGPTv2ForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = MiniGPTv2Config

    def __init__(self, config: MiniGPTv2Config):
        super().__init__(config)
        self.model.multi_modal_projector = Strips(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.post_init()


MiniGPTv2Config.register_for_auto_class()
MiniGPTv2ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
