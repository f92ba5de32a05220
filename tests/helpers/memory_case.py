"""A batch of Mllama or Idefics: padded, with tiles that are closed, and words before the image."""

import torch

from helpers import families
from helpers.every_method import Case

PICTURES = ((60, 44), (20, 20), (100, 30))
PROMPTS = {
    "mllama": ("So <|image|>what is this", "<|image|>hi", "Now, the <|image|>cup and"),
    "idefics": ("what is this", "hi", "the cup and"),
}
"""Idefics' processor puts its image after <s> and a mark, which stand before it."""


class MemoryCase(Case):
    """A batch in which some tiles are closed, and words stand before the image."""

    def __init__(self, name: str):
        super().__init__(name)
        images = [families.picture(*size, seed=i) for i, size in enumerate(PICTURES)]
        self.inputs = self.vlm.inputs(images, list(PROMPTS[name]))
        self.real = self.inputs.encoding["attention_mask"].bool()

    @property
    def is_open(self) -> torch.Tensor:
        """Which positions may read some of the memory, [example pos], from the processor's mask."""
        name = "cross_attention_mask" if self.name == "mllama" else "image_attention_mask"
        return self.inputs.encoding[name].flatten(2).any(-1)

    def gate(self, layer: int, name: str) -> torch.Tensor:
        """tanh of the twin's own parameter; `name` is "attn" or "mlp"."""
        own = {
            "mllama": ("cross_attn_attn_gate", "cross_attn_mlp_gate"),
            "idefics": ("alpha_cross_attn", "alpha_dense"),
        }
        return getattr(self.layer(layer), own[self.name][name == "mlp"]).detach().tanh()
