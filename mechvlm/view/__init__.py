"""Interactive pages that show results beside their inputs and work offline."""

from mechvlm.view.circuitsvis import attention, attention_row, tokens, topk
from mechvlm.view.compare import compare
from mechvlm.view.page import View
from mechvlm.view.patches import patches

__all__ = ["View", "attention", "attention_row", "compare", "patches", "tokens", "topk"]
