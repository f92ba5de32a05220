"""Pages that CircuitsVis draws (Nanda and Cooney 2022).

Its JavaScript comes from the installed package: nothing is fetched.

1. Each place on the page names a CircuitsVis component and holds its data as JSON.
2. A script renders each component into its place, so that any number of them fit on one page.
"""

import re
from functools import lru_cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechvlm.view.page import View, to_json

RENDER_SCRIPT = """
document.querySelectorAll("[data-circuitsvis]").forEach((place, i) => {
  const view = document.createElement("div");
  view.id = "circuitsvis-" + i;
  place.append(view);
  const data = JSON.parse(place.querySelector("script").textContent);
  CircuitsVis.render(view.id, CircuitsVis[place.dataset.circuitsvis], data);
});
"""
CIRCUITSVIS_STYLE = """
h2 { font-size: 16px; margin: 0 0 4px; }
p.note { margin: 0 0 10px; color: #555; max-width: 80ch; }
section { margin-bottom: 28px; }
select { font: inherit; }
.side { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.side > [data-circuitsvis] { flex: 1 1 480px; min-width: 0; max-width: 680px; }
[data-circuitsvis] > div > div { max-width: 100% !important; }
figure.cells { margin: 0; width: 240px; }
figure.cells svg { width: 100%; display: block; background: #ddd; }
figure.cells text { fill: #fff; stroke: #000; paint-order: stroke; text-anchor: middle; dominant-baseline: central; }
figcaption { color: #555; font-size: 12px; }
[data-circuitsvis=AttentionHeads] h2 { font-size: 13px; }
[data-circuitsvis=AttentionHeads] h3 { font-size: 13px; margin: 0 0 6px !important; }
[data-circuitsvis=AttentionHeads] h4 { font-size: 10px; font-weight: 600; }
[data-circuitsvis=TopkTokens] td { padding: 1px 8px; }
/* The logit lens gives no least likely tokens: hide the controls that would show them. */
[data-circuitsvis=TopkTokens] tr:has(> td > div), div:has(> div > #filter-select) { display: none !important; }
/* Replace CircuitsVis's label "Sample": a sample is a row of patches in one table, and its layers in the other. */
[data-circuitsvis^=Topk] label[for^=sample] { font-size: 0; }
[data-circuitsvis^=Topk] label[for^=sample]::before { font-size: 14px; }
[data-circuitsvis=TopkTokens] label[for=sample-selector]::before { content: "Row:"; }
[data-circuitsvis=TopkSamples] label[for=sample-selector]::before { content: "Lines:"; }
[data-circuitsvis=TopkSamples] label[for=samples-per-page-selector]::before { content: "Lines at once:"; }
"""


def circuitsvis_view(
    title: str, note: str, components: list[tuple[str, Any]], preview: bytes, aside: str = "", **view
) -> View:
    """A view of CircuitsVis components under a title and a note.

    Args:
        title: the page's title.
        note: how to read the page.
        components: names of CircuitsVis components, each with its data.
        preview: the picture of the page, a PNG.
        aside: HTML beside the components.
        view: further arguments of `View`.
    """
    places = "".join(
        f'<div data-circuitsvis="{name}"><script type="application/json">{to_json(data)}</script></div>'
        for name, data in components
    )
    body = f'<h2>{escape(title)}</h2>\n<p class="note">{escape(note)}</p>\n<div class="side">{places}{aside}</div>'
    return View(title, body, (bundle(), RENDER_SCRIPT), (CIRCUITSVIS_STYLE,), lambda: preview, **view)


@lru_cache
def bundle() -> str:
    """CircuitsVis's JavaScript, as installed, without the reference to its source map."""
    spec = find_spec("circuitsvis")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("CircuitsVis is not installed: pip install circuitsvis")
    source = Path(spec.submodule_search_locations[0], "dist", "cdn", "iife.js").read_text(encoding="utf-8")
    return re.sub(r"\n//# sourceMappingURL=.*", "", source)


def html_safe(text: str) -> str:
    """Text that stays text where CircuitsVis takes it for HTML: in token lines, not in tooltips.

    An invisible word joiner follows each `<` and `&`, so that neither opens anything. HTML entities
    would be readable in the tooltip.
    """
    return re.sub("[<&]", lambda match: match[0] + "\u2060", text)


def rounded(values: torch.Tensor) -> list:
    """The values with four significant digits: enough for a tooltip, in half the bytes."""
    x = values.detach().cpu().double().numpy()
    scale = 10.0 ** (3 - np.floor(np.log10(np.where(x == 0, 1, np.abs(x)))))
    return (np.round(x * scale) / scale).tolist()
