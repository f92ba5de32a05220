"""Images as the converted systems see them, pixel by pixel: by hand with Pillow."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mechvlm
from helpers.images import noise_image

sys.path.insert(0, str(Path(mechvlm.__file__).parents[1] / "scripts" / "convert"))
import eva
import limber

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images: Radford et al. 2021, github.com/openai/CLIP."""


def normed(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image, dtype=np.float64) / 255
    return torch.from_numpy((pixels - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1).float()


def test_the_tower_sees_the_whole_image_as_a_square():
    image = noise_image(0, (80, 60))
    (got,) = eva.image_processor(56)(image, return_tensors="pt")["pixel_values"]
    want = normed(image.resize((56, 56), Image.Resampling.BICUBIC))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_clips_resnet_sees_the_middle(monkeypatch):
    """80 x 60 has its short side resized to 96, and loses 16 pixels at the left and the right."""
    monkeypatch.setattr(limber, "CLIP_SIZE", 96)
    image = noise_image(1, (80, 60))
    (got,) = limber._clip_images()(image, return_tensors="pt")["pixel_values"]
    want = normed(image.resize((128, 96), Image.Resampling.BICUBIC).crop((16, 0, 112, 96)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
