"""What results look like: figures, and interactive pages that work offline."""

# The functions by name, before their files: `mechvlm.view.patches` is what draws, not the file it is written in.
from mechvlm.view.page import View

__all__ = ["View"]
