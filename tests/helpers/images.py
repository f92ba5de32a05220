"""Images for tests."""

import numpy as np
from PIL import Image


def noise_image(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """Pixels without any symmetry that could hide a swapped axis."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
