"""What results look like: figures, and pages to explore in a browser."""

# At once, not when first asked for: the module of the same name would stand in the function's place.
from mechvlm.view.patches import patches

__all__ = ["patches"]
