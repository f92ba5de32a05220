// The numbers of the page, unpacked. Nothing here touches the page; packing.py has the order of the bytes.

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
const fine = scale(255, 2);
const whole = x => String(Math.round(x * 1000) / 10);
const percent = x => (x > 0 && x < 0.0005 ? "<0.1" : whole(x)) + " %";
const number = x => (x === 0 ? "0" : Math.abs(x) < 1e-4 ? x.toExponential(1) : String(Number(x.toPrecision(2))));
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

// The largest of some values, whatever their sign.
function largest(values, from, to) {
  let most = 0;
  for (let i = from; i < to; i++) most = Math.max(most, Math.abs(values[i]));
  return most;
}

// A token as it is shown: without the space that starts a word, and with signs for invisible characters.
function shown(piece) {
  const plain = piece.replace(/^ (?=.)/u, "").replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  return plain.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, c => (c === "\u200d" ? c : "·")) || "·";
}

// The lens's words: which sources it read (`point`), and the word of each rank at each state.
async function unpackWords(lens) {
  const buffer = await unpack(lens.data), take = reader(buffer), n = lens.states.length * lens.k * lens.sources.length;
  const [low, mid, high, chances] = [1, 2, 3, 4].map(() => take(Uint8Array, n));
  const list = JSON.parse(new TextDecoder().decode(take(Uint8Array, buffer.byteLength - 4 * n)));
  const words = { list, label: list.map(shown) }, point = new Map(lens.sources.map((source, i) => [source, i]));

  // The word of rank k at the lens's state number i: its number in the list, and its chance in steps.
  const idAt = at => low[at] | (mid[at] << 8) | (high[at] << 16);
  function wordAt(i, k, source) {
    if (!point.has(source)) return null;
    const at = (i * lens.k + k) * lens.sources.length + point.get(source), id = idAt(at), share = fine[chances[at]];
    return { id, text: words.label[id], piece: words.list[id], share };
  }
  return { words, point, idAt, wordAt };
}

// The page's data with what can be asked of them: `L` layers, `H` heads, `S` sources, of which the first `V` are visual.
async function model(data) {
  const { layers: L, heads: H, visual: V, images, views, rows, lens } = data;
  const S = data.positions.length, G = images.length + 2, parts = [[0, V], [V, S]];

  const where = places(images, views), { count, sourceOf, place, ofView } = where, cellOf = new Int32Array(V);
  for (const view of views) for (const c of view.empty) sourceOf[view.first + c] = -1;
  if (!data.reading) {
    let source = 0;
    for (let c = 0; c < count; c++) if (sourceOf[c] === 0) { sourceOf[c] = source; cellOf[source++] = c; }
  }

  // ---- rows ----------------------------------------------------------------------------------------------------------
  async function readRow(row) {
    const take = reader(await unpack(row.data));
    // Numbers of several bytes come in planes, all lowest bytes first.
    const planes = (n, length, join) => {
      const own = Array.from({ length: n }, () => take(Uint8Array, length));
      return Int32Array.from({ length }, (_, i) => join(own.map(bytes => bytes[i])));
    };
    const [gaps, n] = take(Uint32Array, 2), top = planes(3, 4 * L * (H + 1), b => (b[0] << 8) | (b[1] << 16) | (b[2] << 24));
    const share = planes(2, 2 * L * (H + 1) * G, b => b[0] | (b[1] << 8));
    const all = take(Uint8Array, 2 * L * S), gap = take(Uint8Array, gaps), weights = take(Uint8Array, n), less = take(Uint8Array, n);
    const raw = new Uint8Array(L * H * S), norm = new Uint8Array(L * H * S);
    for (let g = 0, i = 0, at = 0; g < gaps; g++) {
      at += gap[g];
      if (gap[g] === 255) continue;  // zeros without a value behind them
      raw[at] = weights[i];
      norm[at++] = weights[i] + less[i++];
    }
    return {
      ...row, share, all, heads: [raw, norm], top: new Float32Array(top.buffer),
      scale: scale(row.levels, 1), fine: row.levels === 255 ? fine : scale(127, 2),
    };
  }

  // Fills `out` with what the row reads from each source, and returns it. Measure 0 is raw, 1 is norm-based;
  // head 0 is all heads together.
  function values(row, measure, layer, head, out) {
    const at = (measure * L + layer) * (H + 1) + head;
    const steps = head ? row.heads[measure] : row.all, share = head ? row.scale : row.fine;
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

  // Spreads what is read from each source over the cells of the pictures.
  function spread(read, heat) {
    if (!maps) for (let c = 0; c < count; c++) heat[c] = sourceOf[c] < 0 ? 0 : read[sourceOf[c]];
    else {
      heat.fill(0);
      for (let q = 0; q < V; q++) for (let p = 0; p < count; p++) heat[p] += read[q] * maps[q * count + p];
    }
    return heat;
  }

  // A row is of a source, or of a word of the answer; one of the same positions as another is like that one.
  const decoded = [], ready = [];
  function decode(i) {
    const { like, source, word } = rows[i];
    return decoded[i] ??= (like === undefined ? readRow(rows[i]) : decode(like).then(other => ({ ...other, source, word }))).then(row => (ready[i] = row));
  }
  const [, held, maps] = await Promise.all([
    decode(data.start.row),
    unpackWords(lens),
    data.reading && unpack(data.reading).then(buffer => {
      const take = reader(buffer), top = take(Float32Array, V), steps = take(Uint8Array, V * count);
      return Float32Array.from(steps, (q, i) => top[Math.floor(i / count)] * fine[q]);
    }),
  ]);

  // ---- names ---------------------------------------------------------------------------------------------------------
  const headName = h => h ? `head ${h - 1}` : H > 1 ? "all heads" : "head 0";

  function placeName(source) {
    if (source >= V) return `token “${shown(data.pieces[source - V])}”`;
    if (maps) return `query ${source}`;
    const { view, image, row, col } = place(cellOf[source]);
    return `patch r${row} c${col}${ofView(view, image)}`;
  }

  return {
    ...data, ...where, ...held, L, H, V, S, parts, decode, ready, maps, cellOf,
    rowOf: new Map(rows.map((row, i) => [row.source, i])), rowOfWord: new Map(rows.map((row, i) => [row.word, i])),
    values, shareOf, onImages, spread, headName, placeName, isVisual: source => source < V,
  };
}
