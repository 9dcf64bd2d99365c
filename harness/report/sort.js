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
// A table that is wider than the screen says so: nothing else tells a reader on a phone.
function hintTables() {
  document.querySelectorAll(".scroll").forEach((one) => one.classList.toggle("wide", one.scrollWidth > one.clientWidth + 1));
}
addEventListener("resize", hintTables);
hintTables();
