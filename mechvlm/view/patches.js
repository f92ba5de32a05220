// The patch view. Strings enter the page as text only. Numbers come packed; packing.py has their order.
"use strict";
(() => {
  const HEAT_AT_FIRST = 0.8;

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  async function unpack(text) {
    const coded = atob(text), bytes = new Uint8Array(coded.length);
    for (let i = 0; i < coded.length; i++) bytes[i] = coded.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  // Reads typed arrays that lie one after the other in a buffer.
  function reader(buffer) {
    let at = 0;
    return (kind, length) => {
      const made = new kind(buffer, at, length);
      at += made.byteLength;
      return made;
    };
  }

  const scale = (levels, power) => Float32Array.from({ length: 256 }, (_, q) => (q / levels) ** power);
  const whole = x => String(Math.round(x * 1000) / 10);
  const percent = x => (x > 0 && x < 0.0005 ? "<0.1" : whole(x)) + " %";
  const number = x => (x === 0 ? "0" : Math.abs(x) < 1e-4 ? x.toExponential(1) : String(Number(x.toPrecision(2))));
  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

  // A token as it is shown: without the space that starts a word, and with signs for invisible characters.
  function shown(piece) {
    const plain = piece.replace(/^ (?=.)/u, "").replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
    return plain.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, c => (c === "\u200d" ? c : "·")) || "·";
  }

  async function start(root) {
    const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const { layers: L, heads: H, visual: V, images, rows, lens } = data;
    const S = data.positions.length, G = images.length + 2, parts = [[0, V], [V, S]];
    const count = images.reduce((n, image) => n + image.rows * image.cols, 0);
    const first = [];
    images.reduce((n, image, i) => ((first[i] = n), n + image.rows * image.cols), 0);

    // ---- numbers ---------------------------------------------------------------------------------------------------
    const fine = scale(255, 2);

    async function readRow(row) {
      const take = reader(await unpack(row.data));
      const top = take(Float32Array, 2 * L * (H + 1) * 2), share = take(Uint16Array, 2 * L * (H + 1) * G);
      const all = take(Uint8Array, 2 * L * S), raw = take(Uint8Array, L * H * S), norm = take(Uint8Array, L * H * S);
      for (let i = 0; i < norm.length; i++) norm[i] += raw[i];
      return { ...row, top, share, all, heads: [raw, norm], scale: scale(row.levels, 1) };
    }

    // Fills `out` with what the row reads from each source, and returns it. Measure 0 is raw, 1 is norm-based;
    // head 0 is all heads together.
    function values(row, measure, layer, head, out) {
      const at = (measure * L + layer) * (H + 1) + head;
      const steps = head ? row.heads[measure] : row.all, share = head ? row.scale : fine;
      const from = head ? (layer * H + head - 1) * S : (measure * L + layer) * S;
      parts.forEach(([a, b], part) => {
        const top = row.top[at * 2 + part];
        for (let s = a; s < b; s++) out[s] = top * share[steps[from + s]];
      });
      return out;
    }
    const shareOf = (row, measure, layer, head, group) =>
      row.share[((measure * L + layer) * (H + 1) + head) * G + group] / 65535;
    const onImages = (row, measure, layer, head) =>
      images.reduce((sum, _, i) => sum + shareOf(row, measure, layer, head, i), 0);

    const solid = data.colors.map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));
    const palette = solid.map((rgb, i) => [...rgb, 255 * (0.1 + 0.9 * Math.sqrt(i / 63))]);

    const decoded = rows.map(readRow);
    const ready = [];
    decoded.forEach((promise, i) => promise.then(row => { ready[i] = row; }));
    const [, words, maps] = await Promise.all([
      decoded[data.start.row],
      unpack(lens.data).then(buffer => {
        const take = reader(buffer), n = lens.states.length * lens.k * lens.sources.length;
        const [low, mid, high, chances] = [1, 2, 3, 4].map(() => take(Uint8Array, n));
        const list = JSON.parse(new TextDecoder().decode(take(Uint8Array, buffer.byteLength - 4 * n)));
        return { low, mid, high, chances, list, label: list.map(shown) };
      }),
      data.reading && unpack(data.reading).then(buffer => {
        const take = reader(buffer), top = take(Float32Array, V), steps = take(Uint8Array, V * count);
        return Float32Array.from(steps, (q, i) => top[Math.floor(i / count)] * fine[q]);
      }),
    ]);
    const point = new Map(lens.sources.map((source, i) => [source, i]));

    // ---- state: pinned by a click, or previewed by the pointer ----------------------------------------------------------
    const pinned = { row: data.start.row, query: null, source: data.start.source };
    // Layer l reads state l. L stands for the last state, which no layer reads: words, but no heat.
    const state = { layer: data.start.layer, head: 0, measure: 1 };
    let preview = {};
    const look = () => ({ ...pinned, ...preview });

    const rowOf = new Map(rows.map((row, i) => [row.source, i]));

    // ---- the page ----------------------------------------------------------------------------------------------------
    const slider = el("input", { type: "range", min: 0, max: L, step: 1, "aria-label": "layer" });
    const layerOut = el("output", {});
    const head = el("select", { "aria-label": "head" }, el("option", { value: 0 }, H > 1 ? `all ${H}` : "the only one"));
    if (H > 1) for (let h = 0; h < H; h++) head.append(el("option", { value: h + 1 }, String(h)));
    const measures = ["raw", "norm-based"].map((name, i) => el("button", { type: "button", "data-measure": i }, name));
    measures[0].title = "attention weights";
    measures[1].title = "the norm of what is written: weight times transformed value";
    const strength = el("input", { type: "range", min: 0, max: 100, value: 100 * HEAT_AT_FIRST, "aria-label": "strength of the heat" });
    const controls = el("div", { class: "controls" },
      el("label", { class: "layer" }, el("span", { class: "name" }, "Layer"), slider, layerOut),
      el("label", {}, el("span", { class: "name" }, "Head"), head),
      el("fieldset", { "aria-label": "measure" }, measures[1], measures[0]),
      el("label", { class: "strength" }, el("span", { class: "name" }, "Heat"), strength), el("span", { class: "note" }, data.model));

    const prompt = el("div", { class: "prompt", role: "group", "aria-label": "the prompt's tokens" });
    const chips = chipList();
    const stages = images.map(stage);
    const legendBar = el("span", { class: "bar" }), legendTop = el("span", {}), legendUnit = el("span", { class: "note" });
    legendBar.style.background = `linear-gradient(90deg, ${data.colors.join(",")})`;
    const heading = el("h2", {});
    const read = el("p", { class: "read", "aria-live": "polite" });
    const legend = el("div", { class: "legend" }, "0", legendBar, legendTop, legendUnit);
    const table = wordTable();
    const wordsNote = el("small", {}), wordsTitle = el("h2", {}, "Logit lens", wordsNote);
    const follow = el("button", { type: "button", class: "follow", hidden: "" }, "show what it reads");
    follow.addEventListener("click", () => pin({ row: rowOf.get(pinned.source), query: null }));
    const map = headMap();
    const facts = el("dl", {});
    const mapNote = el("small", {}), mapTitle = el("h2", {}, "Share on the image", mapNote), mapLow = el("span", {}), mapTop = el("span", {});
    const mapLegend = el("div", { class: "legend" }, mapLow, legendBar.cloneNode(), mapTop);
    root.append(controls,
      el("h2", { class: "prompt-title" }, "Prompt", el("small", {}, "  pick the token that reads; the bars show how much it reads from the others")), prompt,
      el("div", { class: "panels" },
        el("section", { class: "panel-image", "aria-label": "image" }, heading,
          el("div", { class: "stages" }, ...stages.map(s => s.node)), legend, read),
        el("section", { class: "panel-words", "aria-label": "logit lens" }, wordsTitle, table.node, follow),
        el("section", { class: "panel-map", "aria-label": "share of the image by layer and head" }, mapTitle,
          el("div", { class: "share" }, map.node, el("div", {}, mapLegend, facts)))),
      el("p", { class: "keys" }, el("kbd", {}, "←"), " ", el("kbd", {}, "→"), " layer. On the image, arrows move the patch and ",
        el("kbd", {}, "Shift"), " with them the layer. Hover to preview, click or ", el("kbd", {}, "Enter"), " to pin, ",
        el("kbd", {}, "Esc"), " to unpin."));
    root.classList.toggle("tall", lens.states.length > 16);

    // ---- chips -------------------------------------------------------------------------------------------------------
    function chipList() {
      const made = [];
      const order = [...data.positions.keys()].sort((a, b) => data.positions[a] - data.positions[b]);
      const chip = (source, text, title) => {
        const row = rowOf.get(source), query = maps && source < V ? source : null;
        const active = row !== undefined || query !== null, words = !active && point.has(source);
        const node = active || words ? el("button", { type: "button", class: "chip" }) : el("span", { class: "chip" });
        const bar = el("i", {});
        node.append(text, bar);
        node.dir = "auto";
        node.title = title + (active ? "" : words ? ": read by the lens; no destination of norms" : ": no destination of norms");
        if (words) node.classList.add("words");
        if (active || words) {
          const to = { ...(active ? { row: row ?? null, query } : {}), ...(point.has(source) ? { source } : {}) };
          node.setAttribute("aria-label", node.title);
          node.addEventListener("pointerenter", () => show(to));
          node.addEventListener("pointerleave", () => show({}));
          node.addEventListener("click", () => pin(to));
        }
        made.push({ node, bar, source, row, query });
        prompt.append(node);
      };
      let before = null;
      for (const source of order) {
        const position = data.positions[source];
        if (source >= V) {
          const piece = data.pieces[source - V];
          chip(source, shown(piece), `${JSON.stringify(piece)} at position ${position}`);
          continue;
        }
        if (maps) {
          chip(source, `q${source}`, `query ${source} at position ${position}`);
          continue;
        }
        const { image, row, col } = cell(source);
        if (before !== image) {
          const node = el("span", { class: "chip image" });
          prompt.append(node);
          made.push({ node, image });
          before = image;
        }
        // Patches that are destinations get chips too, unless they are many: the image is the place to pick from.
        if (rowOf.has(source) && rows.filter(r => r.source < V).length <= 8) {
          chip(source, `r${row} c${col}`, `the patch at row ${row}, column ${col}, position ${position}`);
        }
      }
      return made;
    }

    function cell(source) {
      const image = first.findLastIndex(n => n <= source), { cols } = images[image];
      return { image, row: Math.floor((source - first[image]) / cols), col: (source - first[image]) % cols };
    }

    // ---- image -------------------------------------------------------------------------------------------------------
    function stage(image, number) {
      const [w, h] = image.size, [x0, y0, x1, y1] = image.crop;
      const left = Math.min(0, x0), top = Math.min(0, y0), width = Math.max(w, x1) - left, height = Math.max(h, y1) - top;
      const place = (node, a, b, c, d) => Object.assign(node.style, {
        left: `${(100 * (a - left)) / width}%`, top: `${(100 * (b - top)) / height}%`,
        width: `${(100 * (c - a)) / width}%`, height: `${(100 * (d - b)) / height}%`,
      });
      const picture = el("img", { src: image.src, alt: "", draggable: "false" });
      const canvas = el("canvas", { width: image.cols, height: image.rows });
      const sees = el("div", { class: "sees" });
      const marks = Object.fromEntries(["query", "hover", "pin"].map(name => [name, el("div", { class: `mark ${name}`, hidden: "" })]));
      const which = images.length > 1 ? `image ${number}` : "the image";
      const node = el("figure", { class: "stage", tabindex: 0, role: "application", "aria-roledescription": "patches of an image",
        "aria-label": `${which}, ${image.rows} rows by ${image.cols} columns of patches; arrow keys move the patch` },
      el("div", { class: "clip" }, picture, canvas, sees), ...Object.values(marks));
      place(picture, 0, 0, w, h);
      for (const over of [canvas, sees]) place(over, x0, y0, x1, y1);
      const most = images.length > 1 ? 300 : 480;
      node.style.aspectRatio = `${width} / ${height}`;
      node.style.width = `min(100%, ${Math.round(Math.min(images.length > 1 ? 300 : 900, (most * width) / height))}px)`;

      const at = event => {
        const box = node.getBoundingClientRect();
        const x = left + ((event.clientX - box.left) / box.width) * width, y = top + ((event.clientY - box.top) / box.height) * height;
        const col = Math.floor(((x - x0) / (x1 - x0)) * image.cols), row = Math.floor(((y - y0) / (y1 - y0)) * image.rows);
        return row >= 0 && row < image.rows && col >= 0 && col < image.cols ? first[number] + row * image.cols + col : null;
      };
      node.addEventListener("pointermove", event => {
        const patch = at(event);
        if (patch !== preview.patch) show(patch === null ? {} : { patch, ...(maps ? {} : { source: patch }) });
      });
      node.addEventListener("pointerleave", () => show({}));
      node.addEventListener("click", event => {
        const patch = at(event);
        if (patch !== null && !maps) pin({ source: patch === pinned.source ? null : patch });
      });
      node.addEventListener("keydown", event => {
        const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
        if (!step || event.shiftKey || event.altKey || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        event.stopPropagation();
        const held = maps ? preview.patch : pinned.source;
        const here = held != null && held < count && cell(held).image === number;
        const from = here ? cell(held) : { row: Math.floor(image.rows / 2) - step[0], col: Math.floor(image.cols / 2) - step[1] };
        const row = clamp(from.row + step[0], 0, image.rows - 1), col = clamp(from.col + step[1], 0, image.cols - 1);
        const patch = first[number] + row * image.cols + col;
        if (maps) show({ patch });
        else pin({ source: patch });
      });
      const context = canvas.getContext("2d"), pixels = context.createImageData(image.cols, image.rows);
      return {
        node, canvas, picture,
        paint(heat, top) {
          const out = pixels.data, n = image.rows * image.cols;
          for (let i = 0; i < n; i++) {
            const color = palette[top > 0 ? Math.round((heat[first[number] + i] / top) * 63) : 0];
            out.set(color, 4 * i);
          }
          context.putImageData(pixels, 0, 0);
        },
        mark(name, patch) {
          const here = patch != null && patch < count && cell(patch).image === number;
          marks[name].hidden = !here;
          if (!here) return;
          const { row, col } = cell(patch), dx = (x1 - x0) / image.cols, dy = (y1 - y0) / image.rows;
          place(marks[name], x0 + col * dx, y0 + row * dy, x0 + (col + 1) * dx, y0 + (row + 1) * dy);
        },
      };
    }

    // ---- words -------------------------------------------------------------------------------------------------------
    function wordTable() {
      const shades = Array.from({ length: 256 }, (_, q) => `rgb(11 98 173 / ${(0.03 + 0.85 * fine[q]).toFixed(3)})`);
      const body = el("tbody", { role: "rowgroup" }), cells = [], lines = new Map();
      for (let i = lens.states.length - 1; i >= 0; i--) {
        const layer = lens.states[i], button = el("button", { type: "button", tabindex: -1 }, String(layer));
        button.addEventListener("click", () => set({ layer }));
        button.setAttribute("aria-label", `state ${layer}`);
        const line = el("tr", { role: "row" }, el("th", { role: "rowheader" }, button));
        lines.set(layer, line);
        for (let k = 0; k < lens.k; k++) {
          const word = new Text(), chance = new Text(), td = el("td", { role: "cell" }, el("bdi", {}, word), el("span", {}, chance));
          td.addEventListener("pointerenter", () => { td.title = wordAt(i, k, drawn)?.title ?? ""; });
          cells.push({ i, k, word, chance, td });
          line.append(td);
        }
        body.append(line);
      }
      const titles = Array.from({ length: lens.k }, (_, k) => el("th", { role: "columnheader" }, `top ${k + 1}, %`));
      const node = el("table", { role: "table", "aria-label": "logit-lens words by state" },
        el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, el("th", { role: "columnheader" }, "state"), ...titles)), body);
      const wordAt = (i, k, source) => {
        if (!point.has(source)) return null;
        const at = (i * lens.k + k) * lens.sources.length + point.get(source), step = words.chances[at], share = fine[step];
        const id = words.low[at] | (words.mid[at] << 8) | (words.high[at] << 16);
        return { text: words.label[id], share, shade: shades[step], light: share > 0.85, title: `${words.list[id]}  ${percent(share)}` };
      };
      let drawn;
      return {
        node,
        draw(source) {
          if (source === drawn) return;
          drawn = source;
          // Change the text nodes in place: new ones for half a table would take a whole frame.
          for (const { i, k, word, chance, td } of cells) {
            const { text = "", share = 0, shade = "", light = false } = wordAt(i, k, source) ?? {};
            const rounded = String(Math.round(100 * share) || "");
            if (word.data !== text) word.data = text;
            if (chance.data !== rounded) chance.data = rounded;
            td.style.background = shade;
            td.classList.toggle("light", light);
          }
        },
        current(layer) {
          for (const [l, line] of lines) l === layer ? line.setAttribute("aria-current", "true") : line.removeAttribute("aria-current");
          return lines.has(layer);
        },
      };
    }

    // ---- layers x heads ----------------------------------------------------------------------------------------------
    function headMap() {
      const gap = H > 1 ? 1 : 0, space = 12, across = H > 1 ? H + 1 : 1;
      const size = clamp(Math.floor(200 / L), 5, 20), wide = clamp(Math.floor(200 / across), 4, 24);
      const canvas = el("canvas", { width: H > 1 ? H : 1, height: L }), together = el("canvas", { width: 1, height: L });
      const mark = el("div", { class: "mark", hidden: "" });
      const node = el("div", { class: "map", tabindex: 0, role: "application", "aria-roledescription": "map of layers and heads",
        "aria-label": "share of the row that lies on the image, by layer and head; up and down change the layer, left and right the head" });
      const box = el("div", { class: "mapbox" }, node);
      Object.assign(node.style, { width: `${across * wide + space * gap}px`, height: `${L * size}px` });
      Object.assign(canvas.style, { position: "absolute", left: `${gap * (wide + space)}px`, width: `${canvas.width * wide}px`, height: "100%" });
      Object.assign(together.style, { position: "absolute", left: 0, width: `${wide}px`, height: "100%" });
      node.append(...(gap ? [together] : []), canvas, mark);
      const axis = (text, style) => {
        const made = el("span", { class: "axis", "aria-hidden": "true" }, text);
        Object.assign(made.style, style);
        node.append(made);
      };
      const step = Math.ceil(L / Math.floor((L * size) / 22));
      for (let l = L - 1; l >= 0; l -= step) axis(String(l), { right: "calc(100% + 5px)", top: `${(L - l - 0.5) * size - 5}px` });
      if (gap) {
        axis("all", { left: `${wide / 2 - 6}px`, top: "calc(100% + 5px)" });
        const every = Math.ceil(24 / wide);
        for (let h = 0; h < H; h += every * (H > 12 ? 2 : 1)) axis(String(h), { left: `${wide + space + (h + 0.5) * wide - 3}px`, top: "calc(100% + 5px)" });
      }
      const at = event => {
        const area = node.getBoundingClientRect(), x = event.clientX - area.left;
        const layer = clamp(L - 1 - Math.floor((event.clientY - area.top) / size), 0, L - 1);
        return { layer, head: !gap || x < wide + space / 2 ? 0 : clamp(Math.floor((x - wide - space) / wide) + 1, 1, H) };
      };
      node.addEventListener("click", event => set(at(event)));
      node.addEventListener("pointermove", event => {
        const row = ready[look().row], { layer, head } = at(event);
        if (row) node.title = `layer ${layer}, ${headName(head)}: ${percent(onImages(row, state.measure, layer, head))} on the image`;
      });
      node.addEventListener("keydown", event => {
        const go = { ArrowUp: { layer: Math.min(L - 1, state.layer + 1) }, ArrowDown: { layer: Math.max(0, state.layer - 1) },
          ArrowLeft: { head: Math.max(0, state.head - 1) }, ArrowRight: { head: Math.min(gap ? H : 0, state.head + 1) } }[event.key];
        if (!go || event.shiftKey || event.altKey || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        event.stopPropagation();
        set(go);
      });
      let drawn = {}, low = 0, top = 0;
      return {
        node: box,
        draw(row, measure) {
          if (drawn.row !== row || drawn.measure !== measure) {
            const shares = [];
            for (let l = 0; l < L; l++) for (let h = 0; h <= H; h++) shares.push(row ? onImages(row, measure, l, h) : 0);
            [low, top] = [Math.min(...shares), Math.max(...shares)];
            for (const [to, from, n] of [[canvas, gap, canvas.width], [together, 0, 1]]) {
              const context = to.getContext("2d"), pixels = context.createImageData(n, L);
              for (let l = 0; l < L; l++) {
                for (let h = 0; h < n; h++) {
                  const share = shares[l * (H + 1) + from + h];
                  pixels.data.set([...solid[top > low ? Math.round(((share - low) / (top - low)) * 63) : 0], row ? 255 : 40], 4 * ((L - 1 - l) * n + h));
                }
              }
              context.putImageData(pixels, 0, 0);
            }
            drawn = { row, measure };
          }
          mark.hidden = !row || state.layer === L;
          const x = state.head ? gap * (wide + space) + (state.head - gap) * wide : 0;
          Object.assign(mark.style, { left: `${x}px`, top: `${(L - 1 - state.layer) * size}px`, width: `${wide}px`, height: `${size}px` });
          return [low, top];
        },
      };
    }

    // ---- drawing -----------------------------------------------------------------------------------------------------
    function headName(h) {
      return h ? `head ${h - 1}` : H > 1 ? "all heads" : "head 0";
    }

    function patchName(patch) {
      const { image, row, col } = cell(patch);
      return `row ${row}, column ${col}${images.length > 1 ? ` of image ${image}` : ""}`;
    }

    function placeName(source) {
      if (source >= V) return `token “${shown(data.pieces[source - V])}”`;
      if (maps) return `query ${source}`;
      const { image, row, col } = cell(source);
      return `patch r${row} c${col}${images.length > 1 ? ` of image ${image}` : ""}`;
    }

    const read_ = new Float32Array(S), heat = new Float32Array(count);

    // Fills `heat` and returns its unit, or null when there is no heat.
    function heatOf(row, query) {
      if (row && state.layer < L) values(row, state.measure, state.layer, state.head, read_);
      if (query != null) {
        heat.set(maps.subarray(query * count, (query + 1) * count));
        return `Q-Former attention weight of query ${query}, mean of layers and heads`;
      }
      if (!row || state.layer === L) return null;
      if (!maps) heat.set(read_.subarray(0, count));
      else {
        heat.fill(0);
        for (let q = 0; q < V; q++) for (let p = 0; p < count; p++) heat[p] += read_[q] * maps[q * count + p];
      }
      const one = state.head > 0 || H === 1, by = headName(state.head);
      const what = state.measure ? `norm written${one ? ` by ${by}` : ", heads summed"}` : `attention weight${one ? ` of ${by}` : `, mean of ${H} heads`}`;
      return maps ? `${what}: from each query × where that reads` : what;
    }

    function largest(values, from, to) {
      let most = 0;
      for (let i = from; i < to; i++) if (values[i] > most) most = values[i];
      return most;
    }

    // Draw only what has changed: most often that is the patch under the pointer.
    let now = {};
    function draw() {
      const { row: r, query, source, patch } = look(), row = r == null ? undefined : ready[r];
      if (r != null && !row) decoded[r].then(draw);
      const reads = row && state.layer < L;
      const key = [row?.source, query, state.layer, state.measure, state.head, pinned.row, pinned.query].join();
      if (now.key !== key) {
        const unit = heatOf(row, query);
        now = { key, unit, top: largest(heat, 0, count) };
        drawControls();
        drawHeat(row, query, reads);
        drawChips(row, reads);
        drawMap(row, query);
      }
      for (const one of stages) {
        one.mark("hover", patch);
        one.mark("pin", maps ? null : pinned.source);
        one.mark("query", row && !maps && row.source < V ? row.source : null);
      }
      drawWords(source);
      const under = patch ?? (maps || source == null || source >= V ? null : source);
      read.textContent = under === null ? "" : patchName(under)
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
    }

    function rowName(row, query) {
      if (query != null) return `query ${query}`;
      if (!row) return "";
      return row.source < V ? `the ${placeName(row.source)}` : `“${shown(data.pieces[row.source - V])}”`;
    }

    function drawHeat(row, query) {
      const { layer } = state, { unit, top } = now;
      for (const one of stages) {
        one.canvas.hidden = unit === null;
        if (unit !== null) one.paint(heat, top);
      }
      const when = query != null ? "in the Q-Former, before layer 0"
        : layer < L ? `attention of layer ${layer}, which reads state ${layer}`
          : `no layer reads state ${L}, the output`;
      heading.replaceChildren(`${query != null ? "Where" : "What"} ${rowName(row, query)} reads`, el("small", {}, `  ${when}`));
      legend.style.visibility = unit === null ? "hidden" : "visible";
      legend.title = query == null && state.measure ? "‖Σ α f(x)‖ of the vectors that the heads wrote, in residual-stream units" : "";
      legendTop.textContent = number(top);
      legendUnit.textContent = unit ?? "";
    }

    function drawChips(row, reads) {
      const most = parts.map(([a, b]) => largest(read_, a, b));
      for (const { node, bar, source, row: own, query, image } of chips) {
        if (image !== undefined) {
          const share = reads ? ` · ${percent(shareOf(row, state.measure, state.layer, state.head, image))}` : "";
          node.textContent = `${images.length > 1 ? `image ${image}` : "image"} · ${images[image].rows} × ${images[image].cols} patches${share}`;
          continue;
        }
        const part = source < V ? 0 : 1, length = reads && most[part] > 0 ? read_[source] / most[part] : 0;
        bar.style.transform = `scaleX(${length < 0.02 ? 0 : length})`;
        if (node.type !== "button") continue;
        node.setAttribute("aria-pressed", query !== null ? query === pinned.query : pinned.query === null && own === pinned.row);
      }
    }

    function drawMap(row, query) {
      const [low, high] = map.draw(row, state.measure);
      mapNote.textContent = row ? "  by layer and head" : `  ${rowName(row, query)} is no destination: pick a token that is`;
      mapLegend.style.visibility = row ? "visible" : "hidden";
      mapLow.textContent = percent(low);
      mapTop.textContent = percent(high);
    }

    function drawWords(source) {
      table.draw(source);
      const { layer } = state, which = layer === 0 ? "state 0, embeddings" : layer === L ? `state ${L}, output` : `state ${layer}`;
      const here = table.current(layer) ? which : `state ${layer} not read`;
      wordsTitle.firstChild.data = source == null ? "Logit lens" : `What ${maps || source >= V ? "" : "the "}${placeName(source)} says`;
      wordsNote.textContent = source == null ? `  hover or pick a ${maps ? "query" : "patch"}`
        : point.has(source) ? `  logit lens, ${here}` : "  not read by this lens";
      follow.hidden = maps || pinned.source == null || !rowOf.has(pinned.source) || rowOf.get(pinned.source) === pinned.row;
    }

    function drawFacts(row, reads, source) {
      const lines = [];
      if (reads) {
        const share = group => percent(shareOf(row, state.measure, state.layer, state.head, group));
        images.forEach((_, i) => lines.push([images.length > 1 ? `on image ${i}` : "on the image", share(i)]));
        lines.push(["on text", share(images.length)], ["on special tokens", share(images.length + 1)]);
        if (source != null) lines.push([maps || source >= V ? `on ${placeName(source)}` : "on this patch", number(read_[source])]);
      }
      facts.replaceChildren(...lines.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
    }

    function show(to) {
      preview = to;
      draw();
    }
    function pin(to) {
      Object.assign(pinned, to);
      preview = preview.patch === undefined ? {} : { patch: preview.patch };
      draw();
    }
    function set(to) {
      Object.assign(state, to);
      draw();
    }

    slider.addEventListener("input", () => set({ layer: Number(slider.value) }));
    head.addEventListener("change", () => set({ head: Number(head.value) }));
    measures.forEach((button, i) => button.addEventListener("click", () => set({ measure: i })));
    const warm = () => root.style.setProperty("--heat", strength.value / 100);
    strength.addEventListener("input", warm);
    document.addEventListener("keydown", event => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "Escape") return pin({ source: null });
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
      event.preventDefault();
      set({ layer: clamp(state.layer + step, 0, L) });
    });
    warm();
    draw();
    root.dataset.ready = "true";
    performance.mark("patches drawn");
  }

  for (const root of document.querySelectorAll(".patch-view")) {
    start(root).catch(error => {
      root.append(`The view could not be drawn (${error.message}). It needs a browser of 2023 or later.`);
      throw error;
    });
  }
})();
