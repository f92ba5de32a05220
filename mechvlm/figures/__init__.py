"""What all figures share: one home for axes, titles and sizes; headings, scales, and panels.

>>> mv.figures.grid([lens, norms, flow])    # several results in one figure
"""

from mechvlm.figures.several import grid

__all__ = ["grid"]
