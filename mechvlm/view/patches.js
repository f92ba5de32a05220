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
    const { layers: L, heads: H, visual: V, images, views, rows, lens, answer } = data;
    const S = data.positions.length, G = images.length + 2, parts = [[0, V], [V, S]];
    // Cells of all views are counted through. `sourceOf` and `cellOf` turn a cell into the source that it holds and back, -1: none.
    let count = 0;
    for (const view of views) {
      Object.assign(view, { first: count, dx: (view.crop[2] - view.crop[0]) / view.cols, dy: (view.crop[3] - view.crop[1]) / view.rows });
      count += view.rows * view.cols;
    }
    const viewsOf = image => views.filter(view => view.image === image);
    const sourceOf = new Int32Array(count), cellOf = new Int32Array(V);
    for (const view of views) for (const c of view.empty) sourceOf[view.first + c] = -1;
    if (!data.reading) {
      let source = 0;
      for (let c = 0; c < count; c++) if (sourceOf[c] === 0) { sourceOf[c] = source; cellOf[source++] = c; }
    }

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
    const colorOf = palette.map(rgba => new Uint32Array(Uint8ClampedArray.from(rgba).buffer)[0]);

    // A row is of a source, or of a word of the answer; one of the same positions as another is like that one.
    const decoded = [], ready = [];
    for (const row of rows) {
      decoded.push(row.like === undefined ? readRow(row) : decoded[row.like].then(other => ({ ...other, source: row.source, word: row.word })));
    }
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

    const rowOf = new Map(rows.map((row, i) => [row.source, i])), rowOfWord = new Map(rows.map((row, i) => [row.word, i]));

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
    const written = el("div", { class: "prompt written", role: "group", "aria-label": "the answer's words" });
    const chips = [...answerChips(), ...promptChips()];
    const stages = images.flatMap(stagesOf);
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
      ...(answer.length ? [el("h2", { class: "prompt-title" }, "Answer", el("small", {}, "  pick a word: what was looked at while it was written")), written] : []),
      el("h2", { class: "prompt-title" }, "Prompt", el("small", {}, "  pick the token that reads; the bars show how much it reads from the others")), prompt,
      el("div", { class: "panels" },
        el("section", { class: "panel-image", "aria-label": "image" }, heading,
          el("div", { class: "stages" }, ...stages.map(s => s.node)), legend, read),
        el("section", { class: "panel-words", "aria-label": "logit lens" }, wordsTitle, table.node, follow),
        el("section", { class: "panel-map", "aria-label": "share of the image by layer and head" }, mapTitle,
          el("div", { class: "share" }, map.node, el("div", {}, mapLegend, facts)))),
      el("p", { class: "keys" }, el("kbd", {}, "←"), " ", el("kbd", {}, "→"), " layer. On the map, arrows move layer and head; on the image the patch, and ",
        el("kbd", {}, "Shift"), " with them the layer. Hover to preview, click or ", el("kbd", {}, "Enter"), " to pin, ",
        el("kbd", {}, "Esc"), " to unpin."));
    root.classList.toggle("tall", lens.states.length > 16);

    // ---- chips -------------------------------------------------------------------------------------------------------
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
        const row = rowOfWord.get(i), [last] = word.wrote.slice(-1);
        const at = word.wrote.length > 1 ? `positions ${word.wrote[0]} to ${last}` : `position ${last}`;
        const title = word.sources.length ? `while it wrote “${shown(word.text)}”, at ${at}` : `after the answer, at ${at}`;
        const first = data.positions.indexOf(word.wrote[0]), says = point.has(first) ? { source: first } : {};
        return makeChip(written, word.sources.length ? shown(word.text) : "…", title + (row === undefined ? ": no destination of norms" : ""),
          word.sources, row === undefined ? null : { row, query: null, ...says });
      });
    }

    function promptChips() {
      const made = [], held = new Set(answer.flatMap(word => word.sources));
      const order = [...data.positions.keys()].filter(source => !held.has(source)).sort((a, b) => data.positions[a] - data.positions[b]);
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
        const position = data.positions[source];
        // Visual tokens that no picture shows are many: they get a chip only where they are destinations.
        if (source >= V + data.words && !rowOf.has(source)) continue;
        if (source >= V) {
          const piece = data.pieces[source - V];
          chip(source, shown(piece), `${JSON.stringify(piece)} at position ${position}`);
          continue;
        }
        if (maps) {
          chip(source, `q${source}`, `query ${source} at position ${position}`);
          continue;
        }
        const { image, row, col } = place(cellOf[source]);
        if (before !== image) {
          const node = el("span", { class: "chip image" });
          prompt.append(node);
          made.push({ node, image });
          before = image;
        }
        // Patches that are destinations get chips too, unless they are many: the image is the place to pick from.
        if (rowOf.has(source) && rows.filter(r => r.source < V).length <= 8) {
          chip(source, `r${row} c${col}`, `the patch at ${patchName(cellOf[source])}, position ${position}`);
        }
      }
      return made;
    }

    // Where a cell lies.
    function place(cell) {
      const view = views.findLast(v => v.first <= cell), n = cell - view.first;
      return { view, image: view.image, row: Math.floor(n / view.cols), col: n % view.cols };
    }

    // The cell of some views that lies at (x, y) and holds a token: the smallest, where they overlap.
    function cellAt(own, x, y) {
      let best = null;
      for (const view of own) {
        const row = Math.floor((y - view.crop[1]) / view.dy), col = Math.floor((x - view.crop[0]) / view.dx);
        if (row < 0 || row >= view.rows || col < 0 || col >= view.cols || sourceOf[view.first + row * view.cols + col] < 0) continue;
        if (!best || view.dx * view.dy < best.view.dx * best.view.dy) best = { view, cell: view.first + row * view.cols + col };
      }
      return best?.cell ?? null;
    }

    // ---- image -------------------------------------------------------------------------------------------------------
    // The views of an image lie on sheets, on which none overlaps another. Several sheets are drawn together, then apart.
    function stagesOf(image, number) {
      const own = viewsOf(number), sheets = [...new Set(own.map(view => view.sheet))].map(n => own.filter(view => view.sheet === n));
      if (sheets.length === 1) return [stage(image, number, sheets, "")];
      const name = sheet => sheet.length > 1 ? `${sheet.length} views: ${shapeOf(sheet)} patches` : `${sheet[0].name}: ${shapeOf(sheet)} patches`;
      return [stage(image, number, sheets, "all views together"), ...sheets.map(sheet => stage(image, number, [sheet], name(sheet)))];
    }

    function shapeOf(own) {
      const shapes = [...new Set(own.map(view => `${view.rows} × ${view.cols}`))];
      return shapes.length > 1 ? String(own.reduce((n, view) => n + view.rows * view.cols, 0)) : own.length > 1 ? `${own.length} × ${shapes[0]}` : shapes[0];
    }

    function stage(image, number, sheets, caption) {
      const own = sheets.flat(), [w, h] = image.size, bound = (pick, i) => pick(...own.map(view => view.crop[i]));
      const x0 = bound(Math.min, 0), y0 = bound(Math.min, 1), x1 = bound(Math.max, 2), y1 = bound(Math.max, 3);
      const left = Math.min(0, x0), top = Math.min(0, y0), width = Math.max(w, x1) - left, height = Math.max(h, y1) - top;
      const lay = (node, a, b, c, d) => Object.assign(node.style, {
        left: `${(100 * (a - left)) / width}%`, top: `${(100 * (b - top)) / height}%`,
        width: `${(100 * (c - a)) / width}%`, height: `${(100 * (d - b)) / height}%`,
      });
      const picture = el("img", { src: image.src, alt: "", draggable: "false" });
      const sees = el("div", { class: "sees" });
      const marks = Object.fromEntries(["query", "hover", "pin"].map(name => [name, el("div", { class: `mark ${name}`, hidden: "" })]));
      const which = images.length > 1 ? `image ${number}` : "the image";
      const parts = sheets.length > 1 ? [together(sheets, x0, y0, x1, y1)] : own.map(apart);
      const surface = el("div", { class: "stage", tabindex: 0, role: "application", "aria-roledescription": "patches of an image",
        "aria-label": `${which}${caption && `, ${caption}`}${own.length > 1 ? "" : `, ${own[0].rows} rows by ${own[0].cols} columns of patches`}; arrow keys move the patch` },
      el("div", { class: "clip" }, picture, ...parts.map(part => part.canvas), sees), ...Object.values(marks));
      const node = el("figure", { class: "look" }, surface, ...(caption ? [el("figcaption", {}, caption)] : []));
      lay(picture, 0, 0, w, h);
      for (const part of parts) lay(part.canvas, ...part.box);
      lay(sees, x0, y0, x1, y1);
      const alone = images.length === 1, part = alone && caption && sheets.length === 1, most = alone ? 480 : 300;
      surface.style.aspectRatio = `${width} / ${height}`;
      node.style.width = `min(${part ? "50% - 5px" : "100%"}, ${Math.round(Math.min(alone ? 900 : 300, (most * width) / height))}px)`;

      const at = event => {
        const box = surface.getBoundingClientRect();
        return cellAt(own, left + ((event.clientX - box.left) / box.width) * width, top + ((event.clientY - box.top) / box.height) * height);
      };
      surface.addEventListener("pointermove", event => {
        const patch = at(event);
        if (patch !== preview.patch) show(patch === null ? {} : { patch, ...(maps ? {} : { source: sourceOf[patch] }) });
      });
      surface.addEventListener("pointerleave", () => show({}));
      surface.addEventListener("click", event => {
        const patch = at(event);
        if (patch !== null && !maps) pin({ source: sourceOf[patch] === pinned.source ? null : sourceOf[patch] });
      });
      surface.addEventListener("keydown", event => {
        const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
        if (!step || event.shiftKey || event.altKey || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        event.stopPropagation();
        const held = maps ? preview.patch : pinned.source != null && pinned.source < V ? cellOf[pinned.source] : null;
        const from = held != null && own.includes(place(held).view) ? place(held) : null, { view } = from ?? { view: own[0] };
        const row = from ? from.row + step[0] : Math.floor(view.rows / 2), col = from ? from.col + step[1] : Math.floor(view.cols / 2);
        // Within its view, and else in the view beside it.
        const inside = row >= 0 && row < view.rows && col >= 0 && col < view.cols;
        const next = cellAt(inside ? [view] : own, view.crop[0] + (col + 0.5) * view.dx, view.crop[1] + (row + 0.5) * view.dy);
        const patch = next ?? held;
        if (patch == null) return;
        if (maps) show({ patch });
        else pin({ source: sourceOf[patch] });
      });
      return {
        node, picture, parts,
        mark(name, patch) {
          const { view, image, row, col } = patch == null ? {} : place(patch);
          marks[name].hidden = image !== number;
          if (image !== number) return;
          const x = view.crop[0] + col * view.dx, y = view.crop[1] + row * view.dy;
          lay(marks[name], x, y, x + view.dx, y + view.dy);
        },
      };
    }

    // One view's heat: a pixel a cell.
    function apart(view) {
      const canvas = el("canvas", { width: view.cols, height: view.rows }), n = view.rows * view.cols;
      const context = canvas.getContext("2d"), pixels = context.createImageData(view.cols, view.rows);
      return {
        canvas, box: view.crop,
        measure: () => largest(heat, view.first, view.first + n),
        paint(top) {
          const out = pixels.data;
          for (let i = 0; i < n; i++) {
            if (sourceOf[view.first + i] >= 0) out.set(palette[top > 0 ? Math.round((heat[view.first + i] / top) * 63) : 0], 4 * i);
          }
          context.putImageData(pixels, 0, 0);
        },
      };
    }

    // The heat of views that overlap, added up at each spot of a fine raster.
    function together(sheets, x0, y0, x1, y1) {
      const side = 320, longer = Math.max(x1 - x0, y1 - y0);
      const across = Math.max(1, Math.round((side * (x1 - x0)) / longer)), down = Math.max(1, Math.round((side * (y1 - y0)) / longer));
      const canvas = el("canvas", { width: across, height: down });
      const context = canvas.getContext("2d"), pixels = context.createImageData(across, down);
      const lies = sheets.map(sheet => {
        const cells = new Int32Array(across * down).fill(-1);
        for (let r = 0, i = 0; r < down; r++) {
          for (let c = 0; c < across; c++, i++) cells[i] = cellAt(sheet, x0 + ((c + 0.5) / across) * (x1 - x0), y0 + ((r + 0.5) / down) * (y1 - y0)) ?? -1;
        }
        return cells;
      });
      const sums = new Float32Array(across * down), seen = lies[0].map((_, i) => lies.some(cells => cells[i] >= 0));
      return {
        canvas, box: [x0, y0, x1, y1],
        measure() {
          sums.fill(0);
          for (const cells of lies) for (let i = 0; i < sums.length; i++) if (cells[i] >= 0) sums[i] += heat[cells[i]];
          return largest(sums, 0, sums.length);
        },
        paint(top) {
          const out = new Uint32Array(pixels.data.buffer);
          for (let i = 0; i < sums.length; i++) if (seen[i]) out[i] = colorOf[top > 0 ? Math.round((sums[i] / top) * 63) : 0];
          context.putImageData(pixels, 0, 0);
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
      // One column for all heads and, behind an empty one, a column for each head. Cells are as wide as fit.
      const gap = H > 1 ? 2 : 0, across = H > 1 ? H + 2 : 1, size = clamp(Math.floor(416 / L), 5, 20);
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
            for (const [to, from, n] of [[canvas, gap ? 1 : 0, canvas.width], [together, 0, 1]]) {
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
          Object.assign(mark.style, { left: left(state.head ? gap + state.head - 1 : 0), top: `${(L - 1 - state.layer) * size}px`, width: left(1), height: `${size}px` });
          return [low, top];
        },
      };
    }

    // ---- drawing -----------------------------------------------------------------------------------------------------
    function headName(h) {
      return h ? `head ${h - 1}` : H > 1 ? "all heads" : "head 0";
    }

    function ofView(view, image) {
      return (viewsOf(image).length > 1 ? ` of ${view.name}` : "") + (images.length > 1 ? ` of image ${image}` : "");
    }

    function patchName(patch) {
      const { view, image, row, col } = place(patch);
      return `row ${row}, column ${col}${ofView(view, image)}`;
    }

    function placeName(source) {
      if (source >= V) return `token “${shown(data.pieces[source - V])}”`;
      if (maps) return `query ${source}`;
      const { view, image, row, col } = place(cellOf[source]);
      return `patch r${row} c${col}${ofView(view, image)}`;
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
      if (!maps) for (let c = 0; c < count; c++) heat[c] = sourceOf[c] < 0 ? 0 : read_[sourceOf[c]];
      else {
        heat.fill(0);
        for (let q = 0; q < V; q++) for (let p = 0; p < count; p++) heat[p] += read_[q] * maps[q * count + p];
      }
      const one = state.head > 0 || H === 1, by = headName(state.head);
      const n = row.word === undefined ? 1 : answer[row.word].wrote.length;
      const what = (state.measure ? `norm written${one ? ` by ${by}` : ", heads summed"}` : `attention weight${one ? ` of ${by}` : `, mean of ${H} heads`}`)
        + (n > 1 ? `, mean over the ${n} positions that wrote its tokens` : "");
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
      const key = [row && r, query, state.layer, state.measure, state.head, pinned.row, pinned.query].join();
      if (now.key !== key) {
        const unit = heatOf(row, query);
        now = { key, unit, top: Math.max(...stages.flatMap(one => one.parts.map(part => part.measure()))) };
        drawControls();
        drawHeat(row, query, reads);
        drawChips(row, reads);
        drawMap(row, query);
      }
      for (const one of stages) {
        one.mark("hover", patch);
        one.mark("pin", maps || pinned.source == null || pinned.source >= V ? null : cellOf[pinned.source]);
        one.mark("query", row && !maps && row.source < V ? cellOf[row.source] : null);
      }
      drawWords(source);
      const under = patch ?? (maps || source == null || source >= V ? null : cellOf[source]);
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

    function rowTitle(row, query) {
      if (query != null) return `Where query ${query} reads`;
      if (!row) return "";
      if (row.word === undefined) return `What ${row.source < V ? `the ${placeName(row.source)}` : `“${shown(data.pieces[row.source - V])}”`} reads`;
      const { text, sources } = answer[row.word];
      return sources.length ? `Looked at while it wrote “${shown(text)}”` : "Looked at after the answer";
    }

    function drawHeat(row, query) {
      const { layer } = state, { unit, top } = now;
      for (const part of stages.flatMap(one => one.parts)) {
        part.canvas.hidden = unit === null;
        if (unit !== null) part.paint(top);
      }
      const when = query != null ? "in the Q-Former, before layer 0"
        : layer < L ? `attention of layer ${layer}${row?.word === undefined ? `, which reads state ${layer}` : ""}`
          : `no layer reads state ${L}, the output`;
      heading.replaceChildren(rowTitle(row, query), el("small", {}, `  ${when}`));
      legend.style.visibility = unit === null ? "hidden" : "visible";
      legend.title = query == null && state.measure ? "‖Σ α f(x)‖ of the vectors that the heads wrote, in residual-stream units" : "";
      legendTop.textContent = number(top);
      legendUnit.textContent = unit ?? "";
    }

    function drawChips(row, reads) {
      const most = parts.map(([a, b]) => largest(read_, a, b));
      for (const { node, bars, row: own, query, image } of chips) {
        if (image !== undefined) {
          // The share keeps its width, so that the chips behind it stay in their lines.
          node.replaceChildren(`${images.length > 1 ? `image ${image}` : "image"} · ${shapeOf(viewsOf(image))} patches`,
            el("span", {}, reads ? ` · ${percent(shareOf(row, state.measure, state.layer, state.head, image))}` : ""));
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
      const [low, high] = map.draw(row, state.measure);
      mapNote.textContent = query != null && !row ? `  query ${query} is no destination: pick a token that is`
        : state.layer < L ? `  layer ${state.layer}, ${headName(state.head)}` : "  by layer and head";
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
