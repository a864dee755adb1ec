"use strict";
// Tables sort by the column whose head is pressed; undefined values stay last. Long tables are built when opened.
function key(cell) {
  const value = cell.dataset.v;
  return value === undefined ? cell.textContent.trim() : value === "" ? null : Number(value);
}
function sort(head) {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = Array.from(body.rows, (row) => [key(row.cells[column]), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return down ? -order : order;
  });
  body.append(...rows.map(([, row]) => row));
}
function fill(details) {
  const data = details.querySelector("script");
  if (!details.open || !data) return;
  const body = details.querySelector("tbody"), kinds = Array.from(details.querySelectorAll("thead th"));
  for (const line of JSON.parse(data.textContent)) {
    const row = body.insertRow();
    line.forEach(([text, value], place) => {
      const cell = row.appendChild(document.createElement(place ? "td" : "th"));
      cell.textContent = text;
      if (value !== undefined) cell.dataset.v = value === null ? "" : value;
      if (!place) return;
      cell.className = kinds[place].className;
      cell.dataset.label = Array.from(kinds[place].children, (part) => part.textContent).join(" ").trim();
    });
  }
  data.remove();
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("thead button");
  if (button) sort(button.closest("th"));
});
document.querySelectorAll("details.long").forEach((one) => one.addEventListener("toggle", () => fill(one)));
addEventListener("beforeprint", () => document.querySelectorAll("details.print").forEach((one) => (one.open = true)));
