// Pages of single tokens: values as colors of the tokens and as frames on the image; attention maps; words by state.
// CircuitsVis draws the tokens and the maps. Strings enter the page as text only.

const NEAREST = [0, 0.25, 0.5, 0.75, 1], SIGNED = [-1, -0.5, 0, 0.5, 1];
const dark = matchMedia("(prefers-color-scheme: dark)");
// CircuitsVis draws on white: in the dark, tokens.css turns its maps over, which makes of this color the frames' own, lighter.
const TURNED_OVER = [250, 85, 155];

// CircuitsVis takes a token for HTML: an invisible word joiner behind `<` and `&` keeps either from opening anything.
const asText = label => label.replace(/[<&]/g, "$&\u2060");

let drawings = 0;
// Draws a CircuitsVis component in a place, where it replaces what was drawn before once it is there.
function circuitsvis(name, place, data) {
  const view = el("div", { id: `circuitsvis-${++drawings}`, class: "drawing" });
  place.dataset.circuitsvis = name;
  place.append(view);
  return new Promise(done => {
    new MutationObserver((_, observer) => {
      observer.disconnect();
      while (view.previousSibling) view.previousSibling.remove();
      view.classList.remove("drawing");
      done(view);
    }).observe(view, { childList: true });
    CircuitsVis.render(view.id, CircuitsVis[name], data);
  });
}

async function startTokens(root) {
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const where = places(data.images, data.views), lens = data.lens && await unpackWords(data.lens);
  const { units, steps, heads, patterns, images } = data, S = units.length, cellOf = Array(S).fill(null);
  where.sourceOf.set(data.cells);
  data.cells.forEach((unit, cell) => { if (unit >= 0) cellOf[unit] ??= cell; });
  const m = { ...data, ...where, ...lens, S, V: S, L: steps.length, maps: null, cellOf, placeName: nameOf,
    isVisual: unit => cellOf[unit] !== null, patchName: cell => nameOf(where.sourceOf[cell]) };

  // ---- state: pinned by a click, or previewed by the pointer ---------------------------------------------------------
  const first = patterns ? S - 1 : data.start, pinned = { source: first };
  const state = { at: data.first, head: 0 };
  let preview = {}, wordsShown = false;
  const act = { pinned, state, show, pin, set, redraw: () => draw(), find: text => search?.find(text), previewed: () => preview.patch };

  function nameOf(unit) {
    const { piece, kind, at } = units[unit], place = at === null ? "" : `, position ${at}`;
    if (kind === "image") return `patch at ${where.patchName(cellOf[unit])}${place}`;
    return kind === "token" ? `token “${shown(piece)}”${place}` : `${kind} ${piece}${place}`;
  }

  // What is shown of each unit: what the pinned destination reads in attention maps, or the likeliest word's chance.
  function values() {
    if (patterns) return patterns[mapShown()][pinned.source ?? first];
    if (lens) return units.map((_, unit) => m.wordAt(state.at, 0, unit)?.share ?? null);
    return data.values[state.at][state.head];
  }
  const all = steps.at(-1) - steps[0] === steps.length - 1 || steps.length > 5 ? `${steps[0]} to ${steps.at(-1)}` : steps.join(", ");
  const mapShown = () => preview.map ?? state.at * heads.length + state.head;

  // ---- the page ------------------------------------------------------------------------------------------------------
  const signed = !patterns && !lens && data.values.flat(2).some(value => value < 0), shares = signed ? SIGNED : NEAREST;
  const slider = el("input", { type: "range", min: 0, max: Math.max(0, steps.length - 1), step: 1, "aria-label": data.step });
  const stepOut = el("output", {}), head = el("select", { "aria-label": "head" }, ...heads.map((name, h) => el("option", { value: h }, name)));
  const stages = images.flatMap((image, number) => where.viewsOf(number).length ? stagesOf(m, act, image, number)
    : [{ node: el("figure", { class: "look plain" }, el("img", { src: image.src, alt: `image ${number}` })), parts: [], mark() {} }]);
  const legends = ["image", "tokens"].map(() => ({ low: new Text(), top: new Text() }));
  const imageLegend = el("div", { class: "legend" }, legends[0].low, swatches(m.color, shares, m.negative), legends[0].top, note(data.unit));
  const tokensLegend = el("div", { class: "legend" }, legends[1].low, el("span", { class: signed ? "bar signed" : "bar" }), legends[1].top, note(data.unit));
  const reads = ["image", "tokens"].map(() => el("p", { class: "read", "aria-live": "polite" }));
  const imageTitle = heading(images.length > 1 ? "Images" : "Image");
  const held = new Set(data.answer), groups = [
    ...(held.size ? [group("Answer", data.answer)] : []), group("Prompt", [...units.keys()].filter(unit => !held.has(unit))),
  ];
  const overlay = el("button", { type: "button", class: "overlay", "aria-pressed": "false" }, "Words over the patches");
  const table = lens && wordTable(m, act), search = lens && wordSearch(m, act), lines = el("div", { class: "lines" });
  const wordsNote = el("small", {}), linesTitle = heading();
  const maps = el("div", { class: "maps" }), mapsNote = el("small", {});
  function note(text) { return el("span", { class: "note" }, text); }

  root.style.setProperty("--hue", `rgb(${m.color.join()})`);
  root.style.setProperty("--below", `rgb(${m.negative.join()})`);
  root.append(
    el("header", {}, titled(m.title), el("p", { class: "asked" }, ...(m.model ? [`${m.model} was asked: `] : ["Asked: "]), el("q", {}, m.question)),
      why(m.why)),
    ...(steps.length > 1 || heads.length > 1 && !patterns ? [el("section", { class: "controls", "aria-label": data.step },
      ...(steps.length > 1 ? [el("label", { class: "layer" }, el("span", { class: "name" }, data.step), slider, stepOut)] : []),
      ...(heads.length > 1 && !patterns ? [el("label", {}, el("span", { class: "name" }, "Head"), head)] : []))] : []),
    el("div", { class: "pair" },
      el("section", { class: "panel-image", "aria-label": "image" }, imageTitle, why(m.whyImage), el("div", { class: "stages" }, ...stages.map(s => s.node)),
        ...(data.cells.length ? [imageLegend, reads[0]] : []), ...(lens && stages.some(s => s.over) ? [overlay] : [])),
      el("section", { class: "panel-tokens", "aria-label": "tokens" },
        ...groups.flatMap(({ title, node }) => [heading(title), node]), tokensLegend, reads[1],
        ...(lens ? [heading("Reads as", wordsNote), why("The words that the picked position is nearest to at each state, first state lowest; numbers are chances in percent."),
          search.node, table.node] : []),
        ...(patterns ? [heading("Maps", mapsNote), why("From each source (across) to each destination (down), a map for each head. Point at a small map to see it large, and click to keep it."),
          maps, el("div", { class: "legend" }, "0", el("span", { class: "bar map" }), number(data.top), note(`${data.unit}; the same colors on every map`))] : []))),
    ...(lens ? [el("section", { class: "panel-lines", "aria-label": "words at one state" }, linesTitle,
      why("The likeliest words of a row of positions at the state above, most likely first; the fuller its color, the likelier a word."), lines)] : []),
    el("p", { class: "keys" }, ...(steps.length > 1 ? [el("kbd", {}, "←"), " ", el("kbd", {}, "→"), ` ${data.step.toLowerCase()}. `] : []),
      "On the image arrows move the patch, on the tokens the token", ...(patterns ? [", on the maps layer and head"] : []),
      ...(steps.length > 1 ? ["; ", el("kbd", {}, "Shift"), ` with them the ${data.step.toLowerCase()}`] : []), ". Hover to preview, click to pin, ", el("kbd", {}, "Esc"), " to unpin."));
  root.classList.toggle("many", images.length > 1);

  // ---- the tokens ----------------------------------------------------------------------------------------------------
  // Tokens in their order, in runs between the images; one tab stop, on which arrows move.
  function group(title, list) {
    const node = el("div", { class: "tokens", tabindex: 0, role: "application", "aria-roledescription": "tokens",
      "aria-label": `${title.toLowerCase()}; arrow keys move the token` }), runs = [], own = [];
    let before = null;
    for (const unit of list) {
      if (m.isVisual(unit)) {
        const { image } = where.place(cellOf[unit]);
        if (image !== before) node.append(el("span", { class: "chip image" }, images.length > 1 ? `image ${image}` : "image"));
        before = image;
        continue;
      }
      if (before !== null || !runs.length) {
        runs.push({ place: el("span", { class: "run" }), units: [] });
        node.append(runs.at(-1).place);
        before = null;
      }
      runs.at(-1).units.push(unit);
      own.push(unit);
    }
    const at = event => own.find(unit => spanOf[unit]?.contains(event.target)) ?? null;
    node.addEventListener("pointerover", event => show(at(event) === null ? {} : { source: at(event) }));
    node.addEventListener("pointerleave", () => show({}));
    node.addEventListener("click", event => { if (at(event) !== null) pin({ source: at(event) === pinned.source ? null : at(event) }); });
    node.addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step || event.shiftKey || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      event.stopPropagation();
      const from = own.indexOf(pinned.source);
      preview = {};  // a pointer that rests on the image
      pin({ source: own[clamp(from < 0 ? (step > 0 ? 0 : own.length - 1) : from + step, 0, own.length - 1)] });
    });
    return { title, node, runs, own };
  }
  const spanOf = [];

  // The colors are the page's: CircuitsVis's own would leave words unreadable in the middle of its scale.
  const drawRun = async ({ place, units: own }, now, top) => {
    const view = await circuitsvis("ColoredTokens", place, { tokens: own.map(unit => asText(shown(units[unit].piece))), values: own.map(unit => now[unit]),
      minValue: -top || -1, maxValue: top || 1, positiveColor: `rgb(${m.color.join()})`, negativeColor: `rgb(${m.negative.join()})` });
    colored(view, own.map(unit => now[unit]), top).forEach((span, i) => { spanOf[own[i]] = span; });
    markTokens();
  };
  function colored(view, own, top) {
    const spans = [...view.querySelectorAll(".colored-tokens > span")];
    spans.forEach((span, i) => {
      span.style.setProperty("--share", (top > 0 ? Math.abs(own[i] ?? 0) / top : 0).toFixed(3));
      span.classList.toggle("below", own[i] < 0);
      span.classList.toggle("without", own[i] === null);
    });
    return spans;
  }
  function markTokens() {
    const source = preview.source ?? null;
    spanOf.forEach((span, unit) => {
      span.classList.toggle("pinned", unit === pinned.source);
      span.classList.toggle("hovered", unit === source);
    });
  }

  // ---- the maps ------------------------------------------------------------------------------------------------------
  async function drawMaps() {
    const color = `rgb(${(dark.matches ? TURNED_OVER : m.color).join()})`;
    root.style.setProperty("--map", color);
    const view = await circuitsvis("AttentionHeads", maps, { attention: patterns, tokens: data.labels, attentionHeadNames: data.maps,
      maskUpperTri: false, minValue: -1, maxValue: data.top || 1, positiveColor: color, negativeColor: color });
    const buttons = [...view.querySelectorAll("h4")].map(name => name.parentElement.parentElement);
    buttons.forEach((button, i) => {
      Object.assign(button, { tabIndex: 0, role: "button" });
      button.setAttribute("aria-label", `map of ${mapName(i)}`);
      button.addEventListener("mouseenter", () => show({ map: i }));
      button.addEventListener("mouseleave", () => show({}));
      button.addEventListener("click", () => pickMap(i, false));
      button.addEventListener("keydown", event => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        button.click();
      });
    });
    maps.buttons = buttons;
    pickMap(state.at * heads.length + state.head, true);
  }
  maps.addEventListener("keydown", event => {
    const H = heads.length, go = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!go || event.shiftKey || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const i = clamp(state.at + go[0], 0, steps.length - 1) * H + clamp(state.head + go[1], 0, H - 1);
    pickMap(i, true);
    maps.buttons[i].focus();
  });
  // CircuitsVis keeps its own choice: it is told by a click, as a reader would.
  function pickMap(i, tell) {
    Object.assign(state, { at: Math.floor(i / heads.length), head: i % heads.length });
    if (tell) maps.buttons?.[i]?.click();
    else draw();
  }
  const mapName = i => `layer ${steps[Math.floor(i / heads.length)]}, ${heads[i % heads.length] === "all" ? "all heads" : `head ${heads[i % heads.length]}`}`;

  // ---- drawing -------------------------------------------------------------------------------------------------------
  const heat = new Float32Array(m.count);
  let drawn = "", drawing = Promise.resolve();
  function draw() {
    const key = [mapShown(), state.at, state.head, patterns ? pinned.source : ""].join();
    if (drawn !== key) {
      drawn = key;
      drawing = drawValues();
    }
    const { patch } = preview, source = preview.source ?? pinned.source;
    const place = unit => (unit == null ? null : cellOf[unit]);
    for (const stage of stages) {
      stage.mark("hover", patch ?? null);
      stage.mark("pin", place(pinned.source));
      stage.mark("query", null);
      if (lens) stage.over?.draw(data.lens.states[state.at], wordsShown, search.searched);
    }
    markTokens();
    maps.buttons?.forEach((button, i) => button.setAttribute("aria-pressed", i === state.at * heads.length + state.head));
    const under = patch === undefined ? source : where.sourceOf[patch];
    reads.forEach((read, part) => { read.textContent = under == null || m.isVisual(under) !== (part === 0) ? "" : said(under, part); });
    if (lens) drawWords(under);
  }

  let now = [], tops = [0, 0];
  const said = (unit, part) => `${nameOf(unit)}: ` + (now[unit] === null ? (lens ? "not read" : "no value") : lens ? percent(now[unit])
    : `${number(now[unit])}, ${whole(tops[part] > 0 ? Math.abs(now[unit]) / tops[part] : 0)} % of the largest`);

  function drawValues() {
    now = values();
    for (let cell = 0; cell < m.count; cell++) heat[cell] = where.sourceOf[cell] < 0 ? 0 : now[where.sourceOf[cell]] ?? 0;
    const others = now.filter((_, unit) => !m.isVisual(unit));
    // Chances go from 0 to 1, all else to the largest.
    tops = lens ? [1, 1] : [Math.max(0, ...stages.flatMap(stage => stage.parts.map(part => part.measure(heat)))), largest(others, 0, others.length)];
    for (const part of stages.flatMap(stage => stage.parts)) part.paint(heat, tops[0]);
    legends.forEach(({ low, top }, part) => {
      low.data = signed ? number(-tops[part]) : "0";
      top.data = number(tops[part]);
    });
    tokensLegend.hidden = others.every(value => value === null);
    slider.value = state.at;
    head.value = state.head;
    stepOut.replaceChildren(el("b", {}, String(steps[state.at])), steps.length > 1 ? ` of ${all}` : "");
    slider.setAttribute("aria-valuetext", `${data.step} ${steps[state.at]}`);
    mapsNote.textContent = patterns ? `  ${mapName(mapShown())}` : "";
    return Promise.all(groups.flatMap(({ runs }) => runs.map(run => drawRun(run, now, tops[1]))));
  }

  let lined = "";
  function drawWords(source) {
    table.draw(source);
    table.current(data.lens.states[state.at]);
    wordsNote.textContent = source == null ? "  pick a position" : `  ${nameOf(source)}${m.point.has(source) ? "" : ", not read by this lens"}`;
    search.draw(source, data.lens.states[state.at]);
    const row = data.rows.find(({ units }) => units.includes(source)) ?? data.rows[0], key = [row.name, state.at].join();
    if (lined === key) return;
    lined = key;
    linesTitle.textContent = `At state ${data.lens.states[state.at]}: ${row.name}`;
    lines.replaceChildren(...row.units.map(unit => {
      const place = el("span", { class: "run" }), all = Array.from({ length: data.lens.k }, (_, k) => m.wordAt(state.at, k, unit));
      const go = el("button", { type: "button" }, units[unit].kind === "image" ? `c${where.place(cellOf[unit]).col}` : String(units[unit].at));
      go.setAttribute("aria-label", nameOf(unit));
      go.addEventListener("click", () => pin({ source: unit }));
      // Only what stands on the page can be drawn in.
      queueMicrotask(() => circuitsvis("ColoredTokens", place, { tokens: all.map(word => asText(word.text)), values: all.map(word => word.share),
        minValue: -1, maxValue: 1 }).then(view => colored(view, all.map(word => word.share), 1)));
      return el("div", { class: "line" }, go, el("div", { class: "tokens" }, place));
    }));
  }

  // ---- what a reader does --------------------------------------------------------------------------------------------
  function show(to) {
    if (JSON.stringify(to) === JSON.stringify(preview)) return;
    preview = to;
    draw();
  }
  function pin(to) {
    pinned.source = to.source ?? (patterns ? first : null);
    preview = preview.patch === undefined ? {} : { patch: preview.patch };
    draw();
  }
  function set(to) {
    const at = to.at ?? steps.indexOf(to.layer);
    if (patterns && maps.buttons) return pickMap(at * heads.length + state.head, true);
    Object.assign(state, { at, head: to.head ?? state.head });
    draw();
  }
  slider.addEventListener("input", () => set({ at: Number(slider.value) }));
  head.addEventListener("change", () => set({ at: state.at, head: Number(head.value) }));
  overlay.addEventListener("click", () => {
    wordsShown = !wordsShown;
    overlay.setAttribute("aria-pressed", wordsShown);
    root.classList.toggle("worded", wordsShown);
    root.classList.toggle("roomy", wordsShown && stages.some(stage => stage.wide > 560));
    draw();
  });
  addEventListener("resize", () => draw());
  document.addEventListener("keydown", event => {
    if (event.altKey || event.ctrlKey || event.metaKey || !(event.target === document.body || root.contains(event.target))) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.key !== "Escape") return;
    if (event.key === "Escape") return pin({ source: null });
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || steps.length < 2) return;
    event.preventDefault();
    set({ at: clamp(state.at + step, 0, steps.length - 1) });
  });
  draw();
  if (patterns) {
    await drawMaps();
    dark.addEventListener("change", drawMaps);
  }
  await drawing;
  root.dataset.ready = "true";
}

for (const root of document.querySelectorAll(".token-view")) {
  startTokens(root).catch(error => {
    root.append(`The view could not be drawn (${error.message}). It needs a browser of 2023 or later.`);
    throw error;
  });
}
