"""Two patch views side by side: two answers or two models, with one cursor."""

from html import escape

from mechvlm.errors import ViewError
from mechvlm.view.page import View
from mechvlm.view.patches import PatchView


def compare(a: View, b: View) -> View:
    """Two answers or two models side by side, with one cursor on both.

    A patch that is pointed at or pinned in one view is marked at the same place of the image in the
    other, be their patches of different sizes. Layers move together by depth, first to first and
    last to last, and so does the choice of norms or weights. Words and heads are picked in each.

        >>> asked = vlm.inputs(image, "What is this?")
        >>> two = [asked.answered(text) for text in ("a cat", "a dog")]
        >>> probes = mechvlm.LogitLens(), mechvlm.NormAttention(dst="writing")
        >>> read = [mechvlm.read(vlm, inputs, *probes) for inputs in two]
        >>> pages = [mechvlm.view.patches(inputs, *results) for inputs, results in zip(two, read)]
        >>> mechvlm.view.compare(*pages).save("two.html")

    Args:
        a: a view of `mechvlm.view.patches`.
        b: another one, of the same images.

    Raises:
        ViewError: for other views, for views of different images, or when the page would exceed
            50 MB.
    """
    for name, view in (("a", a), ("b", b)):
        if not isinstance(view, PatchView):
            raise ViewError(
                f"{name} is a {type(view).__name__}, not a view of patches: compare(a, b) takes two pages that "
                "mechvlm.view.patches(inputs, lens, norms) made."
            )
    assert isinstance(a, PatchView)
    assert isinstance(b, PatchView)
    if a.images != b.images:
        raise ViewError(
            f"a shows {len(a.images)} image(s) and b {len(b.images)}, and they are not the same: no cursor can be at "
            "one place of both. Compare answers or models on the same images."
        )
    heading = f"{a.model}: two answers" if a.model == b.model else f"{a.model} and {b.model}"
    why = "Point at a patch, or pin it, and the same place is marked on both sides. Layers move together, by depth."
    return View(
        title=f"{a.title}; {b.title}",
        body=f'<div class="patch-compare"><h1 class="title">{escape(heading)}, side by side</h1><p>{why}</p>'
        f'<div class="sides">{a.body}{b.body}</div></div>',
        scripts=a.scripts,
        styles=a.styles,
        preview=(a + b).preview,
        height=a.height + b.height,
        instead="fewer destinations in each",
    )
