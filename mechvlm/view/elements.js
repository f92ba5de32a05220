// What every page is made of. Strings enter the page as text only.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const why = (...text) => el("p", { class: "why" }, ...text);
const heading = (...text) => el("h2", {}, ...text);
// The title: the page's own, or that of one view among several.
const titled = text => el(document.querySelector("h1") ? "h2" : "h1", { class: "title" }, text);

// Frames as they are drawn on the image, of these shares of the largest: the legend.
function swatches(color, shares, negative) {
  const view = { first: 0, rows: 1, cols: shares.length, cells: FEW_CELLS, crop: [0, 0, shares.length, 1], dx: 1, dy: 1 };
  const m = { color, negative, sourceOf: new Int32Array(shares.length), count: shares.length };
  const made = painter(m, [[view]], view.crop, shares.length * 48, 48);
  made.paint(shares, 1);
  return el("span", { class: "swatches" }, made.canvas);
}
