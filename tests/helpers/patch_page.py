"""The patch view's page as a test reads it, and the results' own numbers beside it."""

import numpy as np
import pytest

# Choose what is shown, as a reader does, and read all that the page then says. A destination is its
# position, or [n] for the answer's word n.
CELLS = """canvas => {
    const { rows, cols } = canvas.dataset, k = canvas.width / cols, thin = Math.min(1, Math.max(rows, cols) / 14);
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const at = (x, y) => { const i = 4 * (Math.floor(y) * canvas.width + Math.floor(x)); return [...data.slice(i, i + 4)]; };
    return Array.from({ length: rows }, (_, r) => Array.from({ length: cols }, (_, c) => ({
        frame: at((c + 0.5) * k, (r + 0.155 * thin) * k), inside: at((c + 0.5) * k, (r + 0.5) * k) }))); }"""
"""The color of each cell of a view's canvas, on its frame and inside: rows of cells of RGBA."""
SHOWN = """([dest, layer, head, measure]) => {
    const q = s => document.querySelector(s), all = s => [...document.querySelectorAll(s)];
    const set = (node, value, event) => { node.value = value; node.dispatchEvent(new Event(event)); };
    const text = s => q(s).textContent, at = node => Number(/position (\\d+)/.exec(node.title)?.[1]);
    const lengths = node => [...node.querySelectorAll("i")].map(i => Number(/scaleX\\((.*)\\)/.exec(i.style.transform)[1]));
    const cells = CELLS, pixels = c => { const { data } = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        return Array.from({ length: c.height }, (_, r) => Array.from({ length: c.width }, (_, i) =>
            [...data.slice(4 * (r * c.width + i), 4 * (r * c.width + i) + 4)])); };
    if (dest?.length) all(".written .chip")[dest[0]].click();
    else if (dest !== null) all(".prompt:not(.written) button.chip").find(b => at(b) === dest).click();
    set(q(".layer input"), layer, "input");
    set(q("select"), head, "change");
    q(`[data-measure="${measure}"]`).click();
    return {
        facts: Object.fromEntries(all("dt").map(d => [d.textContent, d.nextSibling.textContent])),
        top: text(".panel-image .legend span:nth-of-type(2)"), unit: text(".panel-image .legend .note"),
        read: text(".read"), heading: text(".panel-image h2"),
        heat: all(".clip canvas").map(c => cells(c).map(row => row.map(cell => cell.frame))),
        inside: Math.max(...all(".clip canvas").flatMap(c => cells(c).flat().map(cell => cell.inside[3]))),
        map: all(".map canvas").map(pixels),
        mapEnds: [q(".panel-map .legend").firstChild, q(".panel-map .legend").lastChild].map(n => n.textContent),
        images: all(".chip.image").map(n => n.textContent),
        bars: Object.fromEntries(all(".prompt:not(.written) .chip").filter(at).map(n => [at(n), lengths(n)[0]])),
        wordBars: all(".written .chip").map(lengths), pressed: all("[aria-pressed=true].chip").map(n => n.title),
    };
}""".replace("CELLS", CELLS)


def shares(heat) -> np.ndarray:
    """The share of the largest that each frame shows, over all views: its opacity."""
    return np.concatenate([np.array(view)[..., 3].reshape(-1) for view in heat]) / 255


def opened(open_page, view):
    # High enough for all of the page: a pointer hits nothing below the window's edge.
    page = open_page(view, viewport={"width": 1100, "height": 2000})
    page.wait_for_selector(".patch-view[data-ready]", timeout=60_000)
    return page


def number(text: str) -> float:
    text = text.removesuffix(" %")
    return float(text[1:]) / 2 if text.startswith("<") else float(text)


def near(value: float, top: float):
    """Two digits of a value that is stored in steps of its row's maximum."""
    return pytest.approx(value, abs=0.051 * value + 0.0045 * top)


def row_of(norms, dest: int, layer: int, head: int, measure: int) -> np.ndarray:
    """What a destination reads from each position, from the result's own fields; head 0 is all."""
    at = norms.dest[0].tolist().index(dest)
    if measure:
        row = norms.norm_head[layer, 0, head - 1, at] if head else norms.norm[layer, 0, at]
    else:
        weight = norms.weight[layer, 0, :, at]
        row = weight[head - 1] if head else weight.mean(0)
    return row.double().numpy()


def word_row(norms, wrote: list[int], layer: int, head: int, measure: int) -> np.ndarray:
    """The mean of the rows of the positions that wrote a word."""
    return np.mean([row_of(norms, position, layer, head, measure) for position in wrote], 0)


def share_on_images(norms, tokens, dest: int, measure: int) -> np.ndarray:
    """[layer, all and heads]."""
    n_layers, n_heads = len(norms.layers), norms.weight.shape[2]
    rows = [[row_of(norms, dest, la, h, measure) for h in range(n_heads + 1)] for la in range(n_layers)]
    return np.array(rows)[..., tokens.image].sum(-1) / np.array(rows).sum(-1)
