"use strict";
function sortTable(head) {
  const row = head.parentNode, table = row.closest("table"), body = table.tBodies[0];
  const index = [...row.children].indexOf(head), down = head.getAttribute("aria-sort") === "descending";
  for (const other of row.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "ascending" : "descending");
  const value = (line) => line.children[index].dataset.v;
  const order = (a, b) => {
    const x = value(a), y = value(b);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? difference : -difference;
  };
  body.append(...[...body.rows].sort(order));
}
document.querySelectorAll(".sortable th").forEach((head) => head.addEventListener("click", () => sortTable(head)));
