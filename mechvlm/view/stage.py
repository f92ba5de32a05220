"""One image of a still picture, with the values of its cells as frames."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mechvlm.view.drawn import added_up, frames

STAGE_PIXELS = 400
"""Pixels a side in which a still picture draws an image's heat."""
VEIL = 0.76
"""How much white lies over the part of an image that the model does not see."""


class Stage:
    """One image with the heat of all of its views, added up where they overlap."""

    def __init__(self, image, views, heats):
        self.image, self.views, self.heats = image, views, heats
        boxes = np.array([view.grid.crop_box for view in views])
        self.box = x0, y0, x1, y1 = *boxes[:, :2].min(0), *boxes[:, 2:].max(0)
        steps = (np.arange(STAGE_PIXELS) + 0.5) / STAGE_PIXELS
        self.x, self.y = x0 + steps * (x1 - x0), y0 + steps * (y1 - y0)
        # Of views that do not overlap each cell counts, be it smaller than a spot.
        apart = len({view.sheet for view in views}) == 1
        self.top = max(np.abs(heat).max() for heat in (heats if apart else added_up(views, heats, self.x, self.y)[:1]))

    def draw(self, ax: Axes, top: float) -> None:
        """Draw the image, paler where the model does not see it, and the heat from 0 to `top`."""
        image, (x0, y0, x1, y1) = self.image, self.box
        veil = np.full((image.height, image.width, 1), VEIL)
        veil[max(0, round(y0)) : max(0, round(y1)), max(0, round(x0)) : max(0, round(x1))] = 0
        ax.imshow(np.asarray(image) / 255 * (1 - veil) + veil)
        ax.imshow(frames(self.views, self.heats, self.x, self.y, top), extent=(x0, x1, y1, y0), interpolation="nearest")
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="#444444", linewidth=0.8))
        ax.set_xlim(min(0, x0), max(image.width, x1))
        ax.set_ylim(max(image.height, y1), min(0, y0))
        ax.set_axis_off()
