// Where cells lie: those of all views are counted through, view by view, `first` of each on.

// `sourceOf` has the source that each cell holds, for the caller to fill: -1 for none.
function places(images, views) {
  let count = 0;
  for (const view of views) {
    Object.assign(view, { first: count, dx: (view.crop[2] - view.crop[0]) / view.cols, dy: (view.crop[3] - view.crop[1]) / view.rows });
    count += view.rows * view.cols;
  }
  const sourceOf = new Int32Array(count);
  const viewsOf = image => views.filter(view => view.image === image);
  const sheetsOf = image => [...new Set(viewsOf(image).map(view => view.sheet))].map(n => viewsOf(image).filter(view => view.sheet === n));

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

  const ofView = (view, image) => (viewsOf(image).length > 1 ? ` of ${view.name}` : "") + (images.length > 1 ? ` of image ${image}` : "");

  function shapeOf(own) {
    const shapes = [...new Set(own.map(view => `${view.rows} × ${view.cols}`))];
    return shapes.length > 1 ? String(own.reduce((n, view) => n + view.rows * view.cols, 0)) : own.length > 1 ? `${own.length} × ${shapes[0]}` : shapes[0];
  }

  function patchName(patch) {
    const { view, image, row, col } = place(patch);
    return `row ${row}, column ${col}${ofView(view, image)}`;
  }

  return { count, sourceOf, viewsOf, sheetsOf, place, cellAt, ofView, shapeOf, patchName };
}
