// Layers and heads: the map of shares, the heads of one layer, heads kept side by side, and a small map for each layer.

// How much of what was read lay on the image, for each head of each layer: a color from 0 to the largest share.
function headMap(m, act) {
  // One column for all heads and, behind an empty one, a column for each head. Cells are as wide as fit.
  const { L, H } = m, gap = H > 1 ? 2 : 0, across = H > 1 ? H + 2 : 1, size = clamp(Math.floor(416 / L), 8, 24);
  const left = n => `${(100 * n) / across}%`;
  const canvas = el("canvas", { width: H > 1 ? H : 1, height: L }), together = el("canvas", { width: 1, height: L });
  const mark = el("div", { class: "mark", hidden: "" });
  const node = el("div", { class: "map", tabindex: 0, role: "application", "aria-roledescription": "map of layers and heads",
    "aria-label": "share of the row that lies on the image, by layer and head; up and down change the layer, left and right the head" });
  const box = el("div", { class: "mapbox" }, node);
  box.style.width = `${26 + 24 * across}px`;
  node.style.height = `${L * size}px`;
  Object.assign(canvas.style, { position: "absolute", left: left(gap), width: left(canvas.width), height: "100%" });
  Object.assign(together.style, { position: "absolute", left: 0, width: left(1), height: "100%" });
  node.append(...(gap ? [together] : []), canvas, mark);
  const axis = (text, style) => {
    const made = el("span", { class: "axis", "aria-hidden": "true" }, text);
    Object.assign(made.style, style);
    node.append(made);
  };
  const step = Math.ceil(L / Math.floor((L * size) / 22));
  for (let l = L - 1; l >= 0; l -= step) axis(String(l), { right: "calc(100% + 5px)", top: `${(L - l - 0.5) * size - 5}px` });
  if (gap) {
    axis("all", { left: left(0.5), top: "calc(100% + 5px)", transform: "translateX(-50%)" });
    const every = Math.ceil(H / 8);
    for (let h = 0; h < H; h += every) axis(String(h), { left: left(gap + h + 0.5), top: "calc(100% + 5px)", transform: "translateX(-50%)" });
  }
  const at = event => {
    const area = node.getBoundingClientRect(), col = Math.floor(((event.clientX - area.left) / area.width) * across);
    const layer = clamp(L - 1 - Math.floor((event.clientY - area.top) / size), 0, L - 1);
    return { layer, head: col < gap / 2 ? 0 : clamp(col - gap + 1, gap ? 1 : 0, gap ? H : 0) };
  };
  node.addEventListener("click", event => act.set(at(event)));
  node.addEventListener("pointermove", event => {
    const row = act.row(), { layer, head } = at(event);
    if (row) node.title = `layer ${layer}, ${m.headName(head)}: ${percent(m.onImages(row, act.state.measure, layer, head))} on the image`;
  });
  node.addEventListener("keydown", event => {
    const { state } = act;
    const go = { ArrowUp: { layer: Math.min(L - 1, state.layer + 1) }, ArrowDown: { layer: Math.max(0, state.layer - 1) },
      ArrowLeft: { head: Math.max(0, state.head - 1) }, ArrowRight: { head: Math.min(gap ? H : 0, state.head + 1) } }[event.key];
    if (!go || event.shiftKey || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    act.set(go);
  });
  let drawn = {}, top = 0;
  return {
    node: box,
    // Returns the largest share.
    draw(row, { measure, layer, head }) {
      if (drawn.row !== row || drawn.measure !== measure) {
        const shares = [];
        for (let l = 0; l < L; l++) for (let h = 0; h <= H; h++) shares.push(row ? m.onImages(row, measure, l, h) : 0);
        top = Math.max(...shares);
        for (const [to, from, n] of [[canvas, gap ? 1 : 0, canvas.width], [together, 0, 1]]) {
          const context = to.getContext("2d"), pixels = context.createImageData(n, L);
          for (let l = 0; l < L; l++) {
            for (let h = 0; h < n; h++) {
              const share = shares[l * (H + 1) + from + h];
              pixels.data.set([...m.color, top > 0 ? Math.round((255 * share) / top) : 0], 4 * ((L - 1 - l) * n + h));
            }
          }
          context.putImageData(pixels, 0, 0);
        }
        drawn = { row, measure };
      }
      mark.hidden = !row || layer === L;
      Object.assign(mark.style, { left: left(head ? gap + head - 1 : 0), top: `${(L - 1 - layer) * size}px`, width: left(1), height: `${size}px` });
      return top;
    },
  };
}

// The heads of the layer that is shown, as buttons that a finger can hit; each is as colored as on the map.
function headRow(m, act) {
  const { L, H } = m, node = el("div", { class: "heads", role: "group", "aria-label": "heads of the layer" });
  const buttons = Array.from({ length: H > 1 ? H + 1 : 0 }, (_, h) => {
    const share = el("i", {}), button = el("button", { type: "button" }, share, el("span", {}, h ? String(h - 1) : "all"));
    button.addEventListener("click", () => act.set({ head: h }));
    node.append(button);
    return { button, share };
  });
  return {
    node,
    draw(row, { measure, layer, head }, top) {
      node.hidden = !row || layer === L || !buttons.length;
      if (node.hidden) return;
      buttons.forEach(({ button, share }, h) => {
        const x = m.onImages(row, measure, layer, h);
        share.style.opacity = top > 0 ? (x / top).toFixed(3) : 0;
        button.setAttribute("aria-pressed", h === head);
        button.setAttribute("aria-label", `${m.headName(h)}: ${percent(x)} on the image`);
      });
    },
  };
}

// What each layer looked at, as a small map; a click goes to the layer.
function layerRow(m, act) {
  const node = el("div", { class: "layers", role: "group", "aria-label": "what each layer looked at" });
  const maps = Array.from({ length: m.L }, (_, layer) => {
    const small = miniature(m, 24, false), button = el("button", { type: "button", "aria-label": `layer ${layer}` }, small.node, el("span", {}, String(layer)));
    button.addEventListener("click", () => act.set({ layer }));
    node.append(button);
    return { small, button };
  });
  const read = new Float32Array(m.S), heat = new Float32Array(m.count);
  let drawn;
  return {
    node,
    draw(row, { measure, head, layer }) {
      maps.forEach(({ button }, l) => button.setAttribute("aria-pressed", l === layer));
      const key = row && [measure, head].join();
      if (drawn?.row === row && drawn.key === key) return;
      drawn = { row, key };
      maps.forEach(({ small }, l) => {
        if (row) m.spread(m.values(row, measure, l, head, read), heat);
        else heat.fill(0);
        small.paint(heat);
      });
    },
  };
}

// Heads that a reader keeps, side by side, on whatever word is picked.
function keptHeads(m, act) {
  const list = el("div", { class: "kept" }), add = el("button", { type: "button", class: "keep" }), kept = [];
  const read = new Float32Array(m.S), heat = new Float32Array(m.count);
  add.addEventListener("click", () => {
    const { layer, head } = act.state;
    if (layer === m.L || kept.some(one => one.layer === layer && one.head === head)) return;
    const small = miniature(m, 240, true), share = new Text();
    const away = el("button", { type: "button", "aria-label": `remove layer ${layer}, ${m.headName(head)}` }, "×");
    const go = el("button", { type: "button", class: "go", "aria-label": `show layer ${layer}, ${m.headName(head)}` }, small.node);
    const node = el("figure", {}, go, el("figcaption", {}, el("span", {}, `layer ${layer}, ${m.headName(head)}`, el("br"), share), away));
    const one = { layer, head, small, share, node };
    away.addEventListener("click", () => { kept.splice(kept.indexOf(one), 1); node.remove(); act.redraw(); add.focus(); });
    go.addEventListener("click", () => act.set({ layer, head }));
    kept.push(one);
    list.append(node);
    act.redraw();
  });
  return {
    node: el("div", { class: "keeping" }, add, list),
    draw(row, { measure, layer, head }) {
      const has = kept.some(one => one.layer === layer && one.head === head);
      add.textContent = has ? `layer ${layer}, ${m.headName(head)} is kept below` : `Keep layer ${Math.min(layer, m.L - 1)}, ${m.headName(head)} to compare`;
      add.disabled = has || layer === m.L;
      for (const one of kept) {
        if (row) m.spread(m.values(row, measure, one.layer, one.head, read), heat);
        else heat.fill(0);
        one.small.paint(heat);
        one.share.data = row ? `${percent(m.onImages(row, measure, one.layer, one.head))} on the image` : "";
      }
    },
  };
}
