// What a patch reads as: the lens's words by state, the search for a word, and a word's chance over the states.

const sameWord = (text, searched) => text.toLocaleLowerCase() === searched;

function wordTable(m, act) {
  const { lens } = m, cells = [], lines = new Map(), body = el("tbody", { role: "rowgroup" });
  for (let i = lens.states.length - 1; i >= 0; i--) {
    const layer = lens.states[i], button = el("button", { type: "button" }, String(layer));
    button.addEventListener("click", () => act.set({ layer }));
    button.setAttribute("aria-label", `state ${layer}`);
    const line = el("tr", { role: "row" }, el("th", { role: "rowheader" }, button));
    lines.set(layer, line);
    for (let k = 0; k < lens.k; k++) {
      const word = new Text(), chance = new Text(), td = el("td", { role: "cell" }, el("bdi", {}, word), el("span", {}, chance));
      td.addEventListener("pointerenter", () => { td.title = titleAt(i, k); });
      td.addEventListener("click", () => { if (drawn != null) act.find(m.wordAt(i, k, drawn)?.text ?? ""); });
      cells.push({ i, k, word, chance, td });
      line.append(td);
    }
    body.append(line);
  }
  const titles = Array.from({ length: lens.k }, (_, k) => el("th", { role: "columnheader" }, `top ${k + 1}, %`));
  const node = el("table", { role: "table", "aria-label": "logit-lens words by state" },
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, el("th", { role: "columnheader" }, "state"), ...titles)), body);
  const titleAt = (i, k) => {
    const word = m.wordAt(i, k, drawn);
    return word ? `${word.piece}  ${percent(word.share)}` : "";
  };
  let drawn;
  return {
    node,
    draw(source) {
      if (source === drawn) return;
      drawn = source;
      // Change the text nodes in place: new ones for half a table would take a whole frame.
      for (const { i, k, word, chance, td } of cells) {
        const { text = "", share = 0 } = m.wordAt(i, k, source) ?? {};
        const rounded = String(Math.round(100 * share) || "");
        if (word.data !== text) word.data = text;
        if (chance.data !== rounded) chance.data = rounded;
        td.style.setProperty("--share", share.toFixed(3));
      }
    },
    current(layer) {
      for (const [l, line] of lines) l === layer ? line.setAttribute("aria-current", "true") : line.removeAttribute("aria-current");
      return lines.has(layer);
    },
  };
}

// Where does a word appear, and from which state on? And how likely is it at the patch that is shown?
function wordSearch(m, act) {
  const { lens } = m, input = el("input", { type: "search", placeholder: "heart", "aria-label": "find a word", spellcheck: "false", autocomplete: "off" });
  const said = el("p", { class: "said", "aria-live": "polite" }), jump = el("button", { type: "button", class: "jump", hidden: "" }, "Jump to the first");
  const bars = el("div", { class: "counts", role: "group", "aria-label": "patches that read as the word, by state", hidden: "" });
  const curve = el("figure", { class: "curve", hidden: "" });
  const visual = lens.sources.flatMap((source, n) => (m.isVisual(source) ? [[source, n]] : [])), what = m.maps ? "quer" : "patch";
  const many = n => `${n} ${what}${m.maps ? (n === 1 ? "y" : "ies") : n === 1 ? "" : "es"}`;
  let searched = null, first = null, shownAt;

  // The visual tokens whose likeliest word it is, by state.
  function hits(word) {
    const is = m.words.label.map(text => sameWord(text, word));
    return lens.states.map((_, i) => visual.filter(([, n]) => is[m.idAt(i * lens.k * lens.sources.length + n)]).map(([source]) => source));
  }

  function find(text) {
    const word = text.trim().toLocaleLowerCase();
    if (document.activeElement !== input) input.value = text.trim();
    searched = word || null;
    first = null;
    const found = word ? hits(word) : [], most = Math.max(0, ...found.map(own => own.length));
    bars.hidden = !most;
    bars.replaceChildren(...(most ? found.map((own, i) => {
      const bar = el("i", {}), button = el("button", { type: "button", "aria-label": `state ${lens.states[i]}: ${many(own.length)}` },
        bar, el("b", {}, String(own.length)), el("span", {}, String(lens.states[i])));
      bar.style.height = `${Math.round((30 * own.length) / most)}px`;
      button.addEventListener("click", () => act.set({ layer: lens.states[i] }));
      return button;
    }) : []));
    const at = found.findIndex(own => own.length);
    if (most) first = { layer: lens.states[at], source: found[at][0] };
    jump.hidden = !first;
    said.textContent = !word ? "" : !most ? `No ${what}${m.maps ? "y" : ""} has “${text.trim()}” as its likeliest word at any state.`
      : `“${text.trim()}” is the likeliest word from state ${first.layer} on; at most of ${many(most)}, at state ${lens.states[found.findIndex(own => own.length === most)]}.`;
    if (first) jump.textContent = `Jump to the first: state ${first.layer}, ${m.placeName(first.source)}`;
    shownAt = undefined;
    act.redraw();
  }
  input.addEventListener("input", () => find(input.value));
  jump.addEventListener("click", () => { act.set({ layer: first.layer }); act.pin({ source: first.source }); });

  // The word's chance at each state, where it is among the words that the lens carries.
  function draw(source, layer) {
    const key = [source, layer, searched].join();
    if (key === shownAt) return;
    shownAt = key;
    const chances = searched === null || source == null || !m.point.has(source) ? [] : lens.states.map((_, i) => {
      for (let k = 0; k < lens.k; k++) if (sameWord(m.wordAt(i, k, source).text, searched)) return m.wordAt(i, k, source).share;
      return null;
    });
    const carried = chances.flatMap((share, i) => (share === null ? [] : [i])), n = Math.max(1, lens.states.length - 1);
    curve.hidden = searched === null || source == null;
    if (curve.hidden) return;
    const x = i => 8 + (284 * i) / n, y = share => 52 - 44 * share, ns = "http://www.w3.org/2000/svg";
    const make = (tag, attributes) => {
      const node = document.createElementNS(ns, tag);
      for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
      return node;
    };
    const svg = make("svg", { viewBox: "0 0 300 60", role: "img", "aria-label": `chance of ${searched} by state` });
    svg.append(make("path", { class: "axis", d: "M8 52H292M8 8H292" }));
    for (const i of carried) {
      if (carried.includes(i + 1)) svg.append(make("path", { class: "line", d: `M${x(i)} ${y(chances[i])}L${x(i + 1)} ${y(chances[i + 1])}` }));
      svg.append(make("circle", { cx: x(i), cy: y(chances[i]), r: lens.states[i] === layer ? 4.5 : 2.5, "data-state": lens.states[i], "data-share": chances[i].toFixed(4) }));
    }
    const best = carried.reduce((a, b) => (a === null || chances[b] > chances[a] ? b : a), null);
    curve.replaceChildren(svg, el("figcaption", {}, best === null ? `“${searched}” is never among the ${lens.k} likeliest words of ${m.placeName(source)}.`
      : `How likely “${searched}” is at ${m.placeName(source)}, 0 to 100 % from state ${lens.states[0]} to ${lens.states.at(-1)}: at most ${percent(chances[best])}, at state ${lens.states[best]}. `
        + (carried.length < lens.states.length ? `Where it is not among the ${lens.k} likeliest, nothing is drawn.` : "")));
  }
  const node = el("div", { class: "search" }, el("label", {}, el("span", { class: "name" }, "Find a word"), input), said, jump, bars, curve);
  return { node, find, draw, get searched() { return searched; } };
}
