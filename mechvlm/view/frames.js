// Heat as frames: each patch has a frame, the stronger the more was read there, and keeps its own colors inside it.
// `frames` in drawn.py draws the same frames for the still pictures.
const FRAME_PIXELS = 640;  // a canvas has about as many on its longer side
const FEW_CELLS = 14;

// Where in a cell a spot lies, by its distance from the nearest edge in parts of the shorter side: 1 on the frame,
// 2 on the white line that sets it off from an image of its color, 0 outside and inside. Of few cells it is thinner.
function frameAt(distance, cells) {
  const at = distance / Math.min(1, cells / FEW_CELLS);
  return at < 0.04 ? 0 : at < 0.09 ? 2 : at < 0.22 ? 1 : 0;
}

// A canvas over `box` that paints heat, added up where views of several sheets show a spot: as the frames of the
// smallest cells there, or, for small maps, as whole cells.
function painter(m, sheets, box, across, down, framed = true) {
  const canvas = el("canvas", { width: across, height: down, "aria-hidden": "true" }), own = sheets.flat(), [x0, y0, x1, y1] = box;
  const context = canvas.getContext("2d"), pixels = context.createImageData(across, down), out = new Uint32Array(pixels.data.buffer);
  const n = across * down, lies = sheets.map(() => new Int32Array(n).fill(-1)), tone = new Uint8Array(n).fill(255);
  // Along one side of a view: which cell each pixel lies in (-1: none), and how far from its edge.
  const along = (from, to, steps, start, size, cells) => Array.from({ length: steps }, (_, i) => {
    const at = (from + ((i + 0.5) / steps) * (to - from) - start) / size, cell = Math.floor(at);
    return cell < 0 || cell >= cells ? [-1, 0] : [cell, size * Math.min(at - cell, cell + 1 - at)];
  });
  for (const view of own.toSorted((a, b) => a.dx * a.dy - b.dx * b.dy)) {
    const cells = lies[sheets.findIndex(sheet => sheet.includes(view))], short = Math.min(view.dx, view.dy);
    const columns = along(x0, x1, across, view.crop[0], view.dx, view.cols), lines = along(y0, y1, down, view.crop[1], view.dy, view.rows);
    for (let r = 0, i = 0; r < down; r++) {
      const [row, fromTop] = lines[r];
      for (let c = 0; c < across; c++, i++) {
        const [col, fromLeft] = columns[c], cell = view.first + row * view.cols + col;
        if (row < 0 || col < 0 || m.sourceOf[cell] < 0) continue;
        cells[i] = cell;
        if (tone[i] === 255) tone[i] = framed ? frameAt(Math.min(fromTop, fromLeft) / short, view.cells ?? Math.max(view.rows, view.cols)) : 1;
      }
    }
  }
  const at = Int32Array.from(tone.keys()).filter(i => tone[i] === 1 || tone[i] === 2);
  // Values below 0 have a color of their own, where a page has such.
  const [hue, white, below] = [m.color, [255, 255, 255], m.negative ?? m.color].map(rgb =>
    Uint32Array.from({ length: 256 }, (_, a) => new Uint32Array(Uint8ClampedArray.of(...rgb, a).buffer)[0]));
  const alone = sheets.length === 1 ? lies[0] : null, sums = new Float32Array(alone ? 0 : n), steps = new Int16Array(m.count);
  return {
    canvas, box,
    // The largest heat that it shows. Of a single sheet each cell counts, be it smaller than a pixel.
    measure(heat) {
      if (alone) return Math.max(...own.map(view => largest(heat, view.first, view.first + view.rows * view.cols)));
      sums.fill(0);
      for (const cells of lies) for (let i = 0; i < n; i++) if (cells[i] >= 0) sums[i] += heat[cells[i]];
      return largest(sums, 0, n);
    },
    // Opacity is the share of `top`: nothing at 0, full at `top` and at its negative.
    paint(heat, top) {
      if (alone) for (let c = 0; c < steps.length; c++) steps[c] = top > 0 ? Math.round((255 * heat[c]) / top) : 0;
      for (const i of at) {
        const step = alone ? steps[alone[i]] : top > 0 ? Math.round((255 * sums[i]) / top) : 0;
        out[i] = step < 0 ? (tone[i] === 2 ? white : below)[-step] : (tone[i] === 2 ? white : hue)[step];
      }
      context.putImageData(pixels, 0, 0);
    },
  };
}

// The painter of one view: a whole number of pixels a cell.
function viewPainter(m, view) {
  const k = clamp(Math.round(FRAME_PIXELS / Math.max(view.rows, view.cols)), 8, 80);
  const made = painter(m, [[view]], view.crop, view.cols * k, view.rows * k);
  Object.assign(made.canvas.dataset, { rows: view.rows, cols: view.cols });
  return made;
}

// The box around some views, on the original image.
function boxOf(own) {
  const bound = (pick, i) => pick(...own.map(view => view.crop[i]));
  return [bound(Math.min, 0), bound(Math.min, 1), bound(Math.max, 2), bound(Math.max, 3)];
}

// All sheets of an image on one canvas.
function togetherPainter(m, sheets, side, framed) {
  const box = boxOf(sheets.flat()), longer = Math.max(box[2] - box[0], box[3] - box[1]);
  const pixels = i => Math.max(1, Math.round((side * (box[i + 2] - box[i])) / longer));
  return painter(m, sheets, box, pixels(0), pixels(1), framed);
}

// Small pictures of all images, side by side: with frames over the images, or as plain maps without them.
function miniature(m, side, framed) {
  const parts = m.images.map((image, number) => ({ image, made: togetherPainter(m, m.sheetsOf(number), side, framed) }));
  const node = el("span", { class: framed ? "mini" : "mini plain" });
  for (const { image, made } of parts) {
    const [x0, y0, x1, y1] = made.box, [w, h] = image.size, cell = el("span", { class: "cell" });
    cell.style.aspectRatio = `${x1 - x0} / ${y1 - y0}`;
    if (framed) {
      const picture = el("img", { src: image.src, alt: "", draggable: "false" });
      Object.assign(picture.style, { left: `${(-100 * x0) / (x1 - x0)}%`, top: `${(-100 * y0) / (y1 - y0)}%`,
        width: `${(100 * w) / (x1 - x0)}%`, height: `${(100 * h) / (y1 - y0)}%` });
      cell.append(picture);
    }
    cell.append(made.canvas);
    node.append(cell);
  }
  return {
    node,
    paint(heat) {
      const top = Math.max(...parts.map(part => part.made.measure(heat)));
      for (const part of parts) part.made.paint(heat, top);
      return top;
    },
  };
}
