// Two views with one cursor: what is pointed at or pinned in one is marked at the same place of the image in the other.

function link(a, b) {
  b.act.second = true;  // keys that belong to neither move the first, and the second follows
  for (const [from, to] of [[a, b], [b, a]]) {
    const there = cell => {
      const { view, image, row, col } = from.m.place(cell);
      return to.m.cellAt(to.m.viewsOf(image), view.crop[0] + (col + 0.5) * view.dx, view.crop[1] + (row + 0.5) * view.dy);
    };
    from.act.follow = change => {
      if ("patch" in change) {
        const patch = change.patch === null ? null : there(change.patch);
        to.act.show(patch === null ? {} : { patch, ...(to.m.maps ? {} : { source: to.m.sourceOf[patch] }) }, true);
      }
      if (change.pin === null) to.act.pin({ source: null }, true);
      else if (change.pin < from.m.V && !from.m.maps && !to.m.maps) {
        const patch = there(from.m.cellOf[change.pin]);
        if (patch !== null) to.act.pin({ source: to.m.sourceOf[patch] }, true);
      }
      // Layers go together by depth: the first with the first, the last with the last, the output with the output.
      if ("layer" in change) {
        const depth = change.layer / Math.max(1, from.m.L - 1);
        to.act.set({ layer: change.layer === from.m.L ? to.m.L : Math.round(depth * (to.m.L - 1)) }, true);
      }
      if ("measure" in change) to.act.set({ measure: change.measure }, true);
    };
  }
}
