"""What holds on every page, asked in the browser: contrast, sizes of targets, words cut."""

SCREENS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark"), (1920, "light")]
"""(width in pixels, theme): the last is 1080p, the third and fourth a phone."""

# The contrast of every text with what lies behind it, by WCAG 2: [ratio, text].
CONTRAST = """() => {
    const parse = c => { const n = c.match(/[\\d.]+(?:e-\\d+)?%?/g).map(x => x.endsWith("%") ? parseFloat(x) / 100 : +x);
        return c.startsWith("color(srgb") ? [255 * n[0], 255 * n[1], 255 * n[2], n[3] ?? 1] : [n[0], n[1], n[2], n[3] ?? 1]; };
    const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
    const light = c => { const l = c.slice(0, 3).map(x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
    const behind = node => {
        if (!node) return [255, 255, 255];
        const own = parse(getComputedStyle(node).backgroundColor);
        return own[3] === 1 ? own : over(own, behind(node.parentElement));
    };
    const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), out = [];
    while (walk.nextNode()) {
        const node = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
        if (!text || node.closest("script, option") || !node.checkVisibility({ visibilityProperty: true })) continue;
        const ground = behind(node), ink = over(parse(getComputedStyle(node).color), ground);
        const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
        out.push([(a + 0.05) / (b + 0.05), text]);
    }
    return out;
}"""

SMALL = """() => [...document.querySelectorAll("main :is(button, input, select, [tabindex='0'])")]
    .filter(n => n.checkVisibility({ visibilityProperty: true })).map(n => [n.getBoundingClientRect(), n])
    .filter(([b]) => Math.min(b.width, b.height) < 24).map(([b, n]) => `${n.outerHTML.slice(0, 90)} ${b.width} x ${b.height}`)"""

CUT = """where => [...document.querySelectorAll(where)].filter(n => n.scrollWidth > n.clientWidth + 1)
    .map(n => n.outerHTML.slice(0, 80))"""
