// The images with what lies over them: the heat, the words of the patches, the marks of pointer, pin and search.

const WORD_CELL = 44;  // pixels that a word takes; an image without the room scrolls in its frame

// The views of an image lie on sheets, on which none overlaps another. Several sheets are drawn together, then apart.
function stagesOf(m, act, image, number) {
  const sheets = m.sheetsOf(number);
  if (sheets.length === 1) return [stage(m, act, image, number, sheets, "")];
  const name = sheet => sheet.length > 1 ? `${sheet.length} views: ${m.shapeOf(sheet)} patches` : `${sheet[0].name}: ${m.shapeOf(sheet)} patches`;
  return [stage(m, act, image, number, sheets, "all views together"), ...sheets.map(sheet => stage(m, act, image, number, [sheet], name(sheet)))];
}

function stage(m, act, image, number, sheets, caption) {
  const own = sheets.flat(), [w, h] = image.size, [x0, y0, x1, y1] = boxOf(own);
  const left = Math.min(0, x0), top = Math.min(0, y0), width = Math.max(w, x1) - left, height = Math.max(h, y1) - top;
  const lay = (node, a, b, c, d) => Object.assign(node.style, {
    left: `${(100 * (a - left)) / width}%`, top: `${(100 * (b - top)) / height}%`,
    width: `${(100 * (c - a)) / width}%`, height: `${(100 * (d - b)) / height}%`,
  });
  const picture = el("img", { src: image.src, alt: "", draggable: "false" });
  const sees = el("div", { class: "sees" });
  const marks = Object.fromEntries(["query", "hover", "pin"].map(name => [name, el("div", { class: `mark ${name}`, hidden: "" })]));
  const which = m.images.length > 1 ? `image ${number}` : "the image";
  const parts = sheets.length > 1 ? [togetherPainter(m, sheets, 320, true)] : own.map(view => viewPainter(m, view));
  const over = sheets.length > 1 || m.maps ? null : wordsOver(m, own, { left, top, width, height });
  const surface = el("div", { class: "stage", tabindex: 0, role: "application", "aria-roledescription": "patches of an image",
    "aria-label": `${which}${caption && `, ${caption}`}${own.length > 1 ? "" : `, ${own[0].rows} rows by ${own[0].cols} columns of patches`}; arrow keys move the patch` },
  el("div", { class: "clip" }, picture, ...parts.map(part => part.canvas), sees), ...(over ? [over.node] : []), ...Object.values(marks));
  const node = el("figure", { class: "look" }, el("div", { class: "scroll" }, surface), ...(caption ? [el("figcaption", {}, caption)] : []));
  lay(picture, 0, 0, w, h);
  for (const part of parts) lay(part.canvas, ...part.box);
  lay(sees, x0, y0, x1, y1);
  const alone = m.images.length === 1, part = alone && caption && sheets.length === 1, most = alone ? 480 : 300;
  surface.style.aspectRatio = `${width} / ${height}`;
  const wide = Math.ceil((WORD_CELL * width) / Math.min(...own.map(view => view.dx)));
  node.style.setProperty("--own", `min(${part ? "50% - 6px" : "100%"}, ${Math.round(Math.min(alone ? 900 : 300, (most * width) / height))}px)`);
  node.style.setProperty("--wide", `${over ? wide : 0}px`);

  const at = event => {
    const box = surface.getBoundingClientRect();
    return m.cellAt(own, left + ((event.clientX - box.left) / box.width) * width, top + ((event.clientY - box.top) / box.height) * height);
  };
  surface.addEventListener("pointermove", event => {
    const patch = at(event);
    if (patch !== act.previewed()) act.show(patch === null ? {} : { patch, ...(m.maps ? {} : { source: m.sourceOf[patch] }) });
  });
  surface.addEventListener("pointerleave", () => act.show({}));
  surface.addEventListener("click", event => {
    const patch = at(event), { source } = act.pinned;
    if (patch !== null && !m.maps) act.pin({ source: m.sourceOf[patch] === source ? null : m.sourceOf[patch] });
  });
  surface.addEventListener("keydown", event => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || event.shiftKey || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const { source } = act.pinned, held = m.maps ? act.previewed() : source != null && source < m.V ? m.cellOf[source] : null;
    const from = held != null && own.includes(m.place(held).view) ? m.place(held) : null, { view } = from ?? { view: own[0] };
    const row = from ? from.row + step[0] : Math.floor(view.rows / 2), col = from ? from.col + step[1] : Math.floor(view.cols / 2);
    // Within its view, and else in the view beside it.
    const inside = row >= 0 && row < view.rows && col >= 0 && col < view.cols;
    const next = m.cellAt(inside ? [view] : own, view.crop[0] + (col + 0.5) * view.dx, view.crop[1] + (row + 0.5) * view.dy);
    const patch = next ?? held;
    if (patch == null) return;
    if (m.maps) act.show({ patch });
    else act.pin({ source: m.sourceOf[patch] });
  });
  return {
    node, parts, over, wide: over ? wide : 0,
    mark(name, patch) {
      const { view, image, row, col } = patch == null ? {} : m.place(patch);
      marks[name].hidden = image !== number;
      if (image !== number) return;
      const x = view.crop[0] + col * view.dx, y = view.crop[1] + row * view.dy;
      lay(marks[name], x, y, x + view.dx, y + view.dy);
    },
  };
}

// Each patch's likeliest word, the larger the likelier, and a mark on the patches whose word is searched.
function wordsOver(m, own, { left, top, width, height }) {
  const node = el("canvas", { class: "over", "aria-hidden": "true" }), context = node.getContext("2d");
  let drawn = "";
  return {
    node,
    draw(state, words, searched) {
      const i = m.lens.states.indexOf(state), box = node.getBoundingClientRect(), dense = Math.min(2, devicePixelRatio || 1);
      const key = words || searched !== null ? [i, words, searched, box.width, box.height].join() : "";
      if (key === drawn) return;
      drawn = key;
      [node.width, node.height] = key ? [Math.round(box.width * dense), Math.round(box.height * dense)] : [1, 1];
      if (!key || i < 0) return;
      const sx = node.width / width, sy = node.height / height, style = getComputedStyle(node);
      const [ink, ground, accent] = ["--ink", "--ground", "--accent"].map(name => style.getPropertyValue(name));
      Object.assign(context, { textAlign: "center", textBaseline: "middle" });
      for (const view of own) {
        for (let n = 0; n < view.rows * view.cols; n++) {
          const source = m.sourceOf[view.first + n], word = source < 0 ? null : m.wordAt(i, 0, source);
          if (!word) continue;
          const dx = view.dx * sx, dy = view.dy * sy, x = (view.crop[0] - left + ((n % view.cols) + 0.5) * view.dx) * sx;
          const y = (view.crop[1] - top + (Math.floor(n / view.cols) + 0.5) * view.dy) * sy;
          if (words) {
            // As large as its chance, and never wider than its cell.
            const size = Math.min(0.42 * dy, 17 * dense) * (0.55 + 0.45 * word.share);
            context.font = `600 ${size}px system-ui, sans-serif`;
            const wide = context.measureText(word.text).width, shrunk = Math.min(1, (0.9 * dx) / wide);
            context.font = `600 ${size * shrunk}px system-ui, sans-serif`;
            context.globalAlpha = 0.82;
            context.fillStyle = ground;
            context.fillRect(x - 0.5 * wide * shrunk - 2 * dense, y - 0.62 * size * shrunk, wide * shrunk + 4 * dense, 1.24 * size * shrunk);
            context.globalAlpha = 1;
            context.fillStyle = ink;
            context.fillText(word.text, x, y);
          }
          if (searched !== null && sameWord(word.text, searched)) {
            for (const [color, line] of [["#fff", 4], [accent, 2]]) {
              Object.assign(context, { strokeStyle: color, lineWidth: line * dense });
              context.strokeRect(x - 0.34 * dx, y - 0.34 * dy, 0.68 * dx, 0.68 * dy);
            }
          }
        }
      }
    },
  };
}
