// The patch view: what is shown, what is picked, and who draws it. Strings enter the page as text only.

async function start(root) {
  const m = await model(JSON.parse(root.querySelector("script[type='application/json']").textContent));
  const { L, H, V, S, images, rows, lens, answer, parts, ready, maps, point, rowOf } = m;

  // ---- state: pinned by a click, or previewed by the pointer ---------------------------------------------------------
  const pinned = { row: m.start.row, query: null, source: m.start.source };
  // Layer l reads state l. L stands for the last state, which no layer reads: words, but no heat.
  const state = { layer: m.start.layer, head: 0, measure: 1 };
  let preview = {}, wordsShown = false;
  const look = () => ({ ...pinned, ...preview });
  const act = {
    pinned, state, show, pin, set, redraw: () => draw(), find: text => search.find(text),
    previewed: () => preview.patch, row: () => ready[look().row],
    follow: null,  // another view that shows the same place: `link`
  };

  // ---- the page ------------------------------------------------------------------------------------------------------
  const slider = el("input", { type: "range", min: 0, max: L, step: 1, "aria-label": "layer" });
  const layerOut = el("output", {});
  const head = el("select", { "aria-label": "head" }, el("option", { value: 0 }, H > 1 ? `all ${H}` : "the only one"));
  if (H > 1) for (let h = 0; h < H; h++) head.append(el("option", { value: h + 1 }, String(h)));
  const measures = ["raw", "norm-based"].map((name, i) => el("button", { type: "button", "data-measure": i }, name));
  const measureWhy = el("span", {});
  const overlay = el("button", { type: "button", class: "overlay", "aria-pressed": "false" }, "Words over the patches");
  const prompt = el("div", { class: "prompt", role: "group", "aria-label": "the prompt's tokens" });
  const written = el("div", { class: "prompt written", role: "group", "aria-label": "the answer's words" });
  const chips = [...answerChips(), ...promptChips()];
  const stages = images.flatMap((image, number) => stagesOf(m, act, image, number));
  const heatTitle = heading(), legendTop = el("span", {}), legendUnit = el("span", { class: "note" });
  const read = el("p", { class: "read", "aria-live": "polite" });
  const legend = el("div", { class: "legend" }, "0", swatches(m.color, [0, 0.25, 0.5, 0.75, 1]), legendTop, legendUnit);
  const table = wordTable(m, act), search = wordSearch(m, act);
  const wordsNote = el("small", {}), wordsTitle = heading("Reads as", wordsNote);
  const follow = el("button", { type: "button", class: "follow", hidden: "" }, "Show what it looked at");
  follow.addEventListener("click", () => pin({ row: rowOf.get(pinned.source), query: null }));
  const map = headMap(m, act), headButtons = headRow(m, act), layers = layerRow(m, act), kept = keptHeads(m, act);
  const facts = el("dl", {}), mapNote = el("small", {}), mapTop = el("span", {});
  const mapLegend = el("div", { class: "legend" }, "0 %", el("span", { class: "bar" }), mapTop);
  root.style.setProperty("--hue", `rgb(${m.color.join()})`);
  const asked = m.question && el("p", { class: "asked" }, images.length > 1 ? `About ${images.length} images it was asked: ` : "Asked: ", el("q", {}, m.question));
  root.append(
    el("header", {}, titled(m.title),
      ...(asked ? [asked] : []),
      ...(answer.length ? [heading("Answer"), why("Pick a word: the frames on the image show where the model looked while it wrote it."), written] : []),
      heading("Prompt"), why("A token of the prompt can be picked too. The bar under a token shows how much the pick read from it."), prompt),
    el("section", { class: "controls", "aria-label": "layer and head" },
      el("label", { class: "layer" }, el("span", { class: "name" }, "Layer"), slider, layerOut),
      el("label", {}, el("span", { class: "name" }, "Head"), head),
      el("fieldset", { "aria-label": "measure" }, measures[1], measures[0]),
      why(`The model has ${L} layers, one after the other; each small map is what one layer looked at, from 0 to its own largest. `, measureWhy),
      layers.node),
    el("div", { class: "panels" },
      el("section", { class: "panel-image", "aria-label": "image" }, heatTitle,
        why("The stronger a patch's frame, the more was read from it; inside, the image is as it is."),
        el("div", { class: "stages" }, ...stages.map(s => s.node)), legend, read, ...(stages.some(one => one.over) ? [overlay] : [])),
      el("section", { class: "panel-words", "aria-label": "logit lens" }, wordsTitle,
        why(`The words that a ${maps ? "query" : "patch"} is nearest to at each state, first state lowest (logit lens); numbers are chances in percent.`),
        search.node, table.node, follow),
      el("section", { class: "panel-map", "aria-label": "share of the image by layer and head" }, heading("Layers and heads", mapNote),
        why("Each head of a layer looks by itself: the stronger its color, the more of what it read lay on the image."),
        headButtons.node, el("div", { class: "share" }, map.node, el("div", {}, mapLegend, facts)), kept.node)),
    el("p", { class: "keys" }, el("kbd", {}, "←"), " ", el("kbd", {}, "→"), " layer. On the map, arrows move layer and head; on the image the patch, and ",
      el("kbd", {}, "Shift"), " with them the layer. Hover to preview, click or ", el("kbd", {}, "Enter"), " to pin, ",
      el("kbd", {}, "Esc"), " to unpin."));
  root.classList.toggle("tall", lens.states.length > 16);
  root.classList.toggle("many", images.length > 1);

  // ---- chips ---------------------------------------------------------------------------------------------------------
  // A chip that shows `to` when it is pointed at or picked; one that shows nothing is no button.
  function makeChip(where, text, title, sources, to) {
    const node = to ? el("button", { type: "button", class: "chip" }, text) : el("span", { class: "chip" }, text);
    // One bar for each token, side by side.
    const bars = sources.map((source, i) => {
      const bar = el("i", {}), part = n => `calc(3px + (100% - 6px) * ${n / sources.length})`;
      Object.assign(bar.style, { left: part(i), right: part(sources.length - 1 - i) });
      node.append(bar);
      return { bar, source };
    });
    node.dir = "auto";
    node.title = title;
    if (to) {
      node.setAttribute("aria-label", title);
      node.addEventListener("pointerenter", () => show(to));
      node.addEventListener("pointerleave", () => show({}));
      node.addEventListener("click", () => pin(to));
    }
    where.append(node);
    return { node, bars, row: to?.row, query: to?.query ?? null };
  }

  function answerChips() {
    return answer.map((word, i) => {
      const row = m.rowOfWord.get(i), [last] = word.wrote.slice(-1);
      const at = word.wrote.length > 1 ? `positions ${word.wrote[0]} to ${last}` : `position ${last}`;
      const title = word.sources.length ? `while it wrote “${shown(word.text)}”, at ${at}` : `after the answer, at ${at}`;
      const first = m.positions.indexOf(word.wrote[0]), says = point.has(first) ? { source: first } : {};
      return makeChip(written, word.sources.length ? shown(word.text) : "…", title + (row === undefined ? ": no destination of norms" : ""),
        word.sources, row === undefined ? null : { row, query: null, ...says });
    });
  }

  function promptChips() {
    const made = [], held = new Set(answer.flatMap(word => word.sources));
    const order = [...m.positions.keys()].filter(source => !held.has(source)).sort((a, b) => m.positions[a] - m.positions[b]);
    const chip = (source, text, title) => {
      const row = rowOf.get(source), query = maps && source < V ? source : null;
      const active = row !== undefined || query !== null, words = !active && point.has(source);
      const to = { ...(active ? { row: row ?? null, query } : {}), ...(point.has(source) ? { source } : {}) };
      const one = makeChip(prompt, text, title + (active ? "" : words ? ": read by the lens; no destination of norms" : ": no destination of norms"),
        [source], active || words ? to : null);
      if (words) one.node.classList.add("words");
      made.push(one);
    };
    let before = null;
    for (const source of order) {
      const position = m.positions[source];
      // Visual tokens that no picture shows are many: they get a chip only where they are destinations.
      if (source >= V + m.n_words && !rowOf.has(source)) continue;
      if (source >= V) {
        const piece = m.pieces[source - V];
        chip(source, shown(piece), `${JSON.stringify(piece)} at position ${position}`);
        continue;
      }
      if (maps) {
        chip(source, `q${source}`, `query ${source} at position ${position}`);
        continue;
      }
      const { image, row, col } = m.place(m.cellOf[source]);
      if (before !== image) {
        const node = el("span", { class: "chip image" });
        prompt.append(node);
        made.push({ node, image });
        before = image;
      }
      // Patches that are destinations get chips too, unless they are many: the image is the place to pick from.
      if (rowOf.has(source) && rows.filter(r => r.source < V).length <= 8) {
        chip(source, `r${row} c${col}`, `the patch at ${m.patchName(m.cellOf[source])}, position ${position}`);
      }
    }
    return made;
  }

  // ---- drawing -------------------------------------------------------------------------------------------------------
  const read_ = new Float32Array(S), heat = new Float32Array(m.count);

  // Fills `heat` and returns its unit, or null when there is no heat.
  function heatOf(row, query) {
    if (row && state.layer < L) m.values(row, state.measure, state.layer, state.head, read_);
    if (query != null) {
      heat.set(maps.subarray(query * m.count, (query + 1) * m.count));
      return `Q-Former attention weight of query ${query}, mean of layers and heads`;
    }
    if (!row || state.layer === L) return null;
    m.spread(read_, heat);
    const one = state.head > 0 || H === 1, by = m.headName(state.head);
    const n = row.word === undefined ? 1 : answer[row.word].wrote.length;
    const what = (state.measure ? `norm written${one ? ` by ${by}` : ", heads summed"}` : `attention weight${one ? ` of ${by}` : `, mean of ${H} heads`}`)
      + (n > 1 ? `, mean over the ${n} positions that wrote its tokens` : "");
    return maps ? `${what}: from each query × where that reads` : what;
  }

  // Draw only what has changed: most often that is the patch under the pointer.
  let now = {};
  function draw() {
    const { row: r, query, source, patch } = look(), row = r == null ? undefined : ready[r];
    if (r != null && !row) m.decode(r).then(() => draw());
    const reads = row && state.layer < L;
    const key = [row && r, query, state.layer, state.measure, state.head, pinned.row, pinned.query].join();
    if (now.key !== key) {
      const unit = heatOf(row, query);
      now = { key, unit, top: Math.max(...stages.flatMap(one => one.parts.map(part => part.measure(heat)))) };
      drawControls();
      drawHeat(row, query);
      drawChips(row, reads);
      drawMap(row, query);
    }
    kept.draw(row, state);
    for (const one of stages) {
      one.mark("hover", patch);
      one.mark("pin", maps || pinned.source == null || pinned.source >= V ? null : m.cellOf[pinned.source]);
      one.mark("query", row && !maps && row.source < V ? m.cellOf[row.source] : null);
      one.over?.draw(state.layer, wordsShown, search.searched);
    }
    drawWords(source);
    const under = patch ?? (maps || source == null || source >= V ? null : m.cellOf[source]);
    read.textContent = under === null ? "" : m.patchName(under)
      + (now.unit === null ? "" : `: ${number(heat[under])}, ${whole(now.top > 0 ? heat[under] / now.top : 0)} % of the largest`);
    drawFacts(row, reads, source);
  }

  function drawControls() {
    const { layer } = state;
    slider.value = layer;
    slider.setAttribute("aria-valuetext", layer < L ? `layer ${layer}, of 0 to ${L - 1}` : `the output, state ${L}`);
    layerOut.replaceChildren(el("b", {}, layer < L ? String(layer) : "output"), layer < L ? ` of 0 to ${L - 1}` : "");
    head.value = state.head;
    measures.forEach((button, i) => button.setAttribute("aria-pressed", i === state.measure));
    measureWhy.textContent = state.measure ? "Norm-based: how long the vectors are that attention wrote." : "Raw: the attention weights.";
  }

  function rowTitle(row, query) {
    if (query != null) return `Where query ${query} reads`;
    if (!row) return "";
    if (row.word === undefined) return `What ${row.source < V ? `the ${m.placeName(row.source)}` : `“${shown(m.pieces[row.source - V])}”`} looked at`;
    const { text, sources } = answer[row.word];
    return sources.length ? `Looked at while it wrote “${shown(text)}”` : "Looked at after the answer";
  }

  function drawHeat(row, query) {
    const { layer } = state, { unit, top } = now;
    for (const part of stages.flatMap(one => one.parts)) {
      part.canvas.hidden = unit === null;
      if (unit !== null) part.paint(heat, top);
    }
    const when = query != null ? "in the Q-Former, before layer 0"
      : layer < L ? `attention of layer ${layer}${row?.word === undefined ? `, which reads state ${layer}` : ""}`
        : `no layer reads state ${L}, the output`;
    heatTitle.replaceChildren(rowTitle(row, query), el("small", {}, `  ${when}`));
    legend.style.visibility = unit === null ? "hidden" : "visible";
    legendTop.textContent = number(top);
    legendUnit.textContent = unit ?? "";
  }

  function drawChips(row, reads) {
    const most = parts.map(([a, b]) => largest(read_, a, b));
    for (const { node, bars, row: own, query, image } of chips) {
      if (image !== undefined) {
        // The share keeps its width, so that the chips behind it stay in their lines.
        node.replaceChildren(`${images.length > 1 ? `image ${image}` : "image"} · ${m.shapeOf(m.viewsOf(image))} patches`,
          el("span", {}, reads ? ` · ${percent(m.shareOf(row, state.measure, state.layer, state.head, image))}` : ""));
        continue;
      }
      for (const { bar, source } of bars) {
        const part = source < V ? 0 : 1, length = reads && most[part] > 0 ? read_[source] / most[part] : 0;
        bar.style.transform = `scaleX(${length < 0.02 ? 0 : length})`;
      }
      if (node.type !== "button") continue;
      node.setAttribute("aria-pressed", query !== null ? query === pinned.query : pinned.query === null && own === pinned.row);
    }
  }

  function drawMap(row, query) {
    const top = map.draw(row, state);
    headButtons.draw(row, state, top);
    layers.draw(row, state);
    mapNote.textContent = query != null && !row ? `  query ${query} is no destination: pick a token that is`
      : state.layer < L ? `  layer ${state.layer}, ${m.headName(state.head)}` : "";
    mapLegend.style.visibility = row ? "visible" : "hidden";
    mapTop.textContent = percent(top);
  }

  function drawWords(source) {
    table.draw(source);
    const { layer } = state, which = layer === 0 ? "state 0, embeddings" : layer === L ? `state ${L}, output` : `state ${layer}`;
    const here = table.current(layer) ? which : `state ${layer} not read`;
    wordsNote.textContent = source == null ? `  hover or pick a ${maps ? "query" : "patch"}`
      : `  ${m.placeName(source)}, ${point.has(source) ? here : "not read by this lens"}`;
    search.draw(source, layer);
    follow.hidden = maps || pinned.source == null || !rowOf.has(pinned.source) || rowOf.get(pinned.source) === pinned.row;
  }

  function drawFacts(row, reads, source) {
    const lines = [];
    if (reads) {
      const share = group => percent(m.shareOf(row, state.measure, state.layer, state.head, group));
      images.forEach((_, i) => lines.push([images.length > 1 ? `on image ${i}` : "on the image", share(i)]));
      lines.push(["on text", share(images.length)], ["on special tokens", share(images.length + 1)]);
      if (source != null) lines.push([maps || source >= V ? `on ${m.placeName(source)}` : "on this patch", number(read_[source])]);
    }
    facts.replaceChildren(...lines.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }

  function show(to, alone) {
    preview = to;
    draw();
    if (!alone) act.follow?.({ patch: to.patch ?? null });
  }
  function pin(to, alone) {
    Object.assign(pinned, to);
    preview = preview.patch === undefined ? {} : { patch: preview.patch };
    draw();
    if (!alone && "source" in to) act.follow?.({ pin: to.source });
  }
  function set(to, alone) {
    Object.assign(state, to);
    draw();
    if (!alone) act.follow?.(to);
  }

  slider.addEventListener("input", () => set({ layer: Number(slider.value) }));
  head.addEventListener("change", () => set({ head: Number(head.value) }));
  measures.forEach((button, i) => button.addEventListener("click", () => set({ measure: i })));
  overlay.addEventListener("click", () => {
    wordsShown = !wordsShown;
    overlay.setAttribute("aria-pressed", wordsShown);
    root.classList.toggle("worded", wordsShown);
    root.classList.toggle("roomy", wordsShown && stages.some(one => one.wide > 560));
    draw();
  });
  addEventListener("resize", () => draw());
  document.addEventListener("keydown", event => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.target === document.body ? act.second : !root.contains(event.target)) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.key !== "Escape") return;
    if (event.key === "Escape") return pin({ source: null });
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    set({ layer: clamp(state.layer + step, 0, L) });
  });
  draw();
  root.dataset.ready = "true";
  performance.mark("patches drawn");
  // The other rows one after the other, so that a word shows at once when it is picked.
  (async () => { for (let i = 0; i < rows.length; i++) await m.decode(i); })();
  return { m, act };
}

const started = new Map();
for (const root of document.querySelectorAll(".patch-view")) {
  const made = start(root);
  started.set(root, made);
  made.catch(error => {
    root.append(`The view could not be drawn (${error.message}). It needs a browser of 2023 or later.`);
    throw error;
  });
}
for (const pair of document.querySelectorAll(".patch-compare")) {
  Promise.all([...pair.querySelectorAll(".patch-view")].map(root => started.get(root))).then(([a, b]) => {
    link(a, b);
    pair.dataset.ready = "true";
  }, () => {});
}
