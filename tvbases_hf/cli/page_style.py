"""How a page looks, and the one script that sorts its tables."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --faint: #55595f; --paper: #ffffff; --line: #d5d8dc;
  --band: #f3f5f7; --link: #0a58a8; --bad: #9b1c1c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #a8adb4; --paper: #16181b; --line: #3a3f45; --band: #202428; --link: #8ec1ff;
    --bad: #ff9c9c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.1rem; line-height: 1.3; margin: 2rem 0 0.25rem; }
section > p, .made { color: var(--faint); margin: 0.25rem 0 0.75rem; }
.warning { color: var(--bad); }
pre { background: var(--band); padding: 0.75rem; white-space: pre-wrap; font: 0.875rem/1.4 ui-monospace, monospace; }
.table { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
tbody th, thead th:first-child { text-align: left; font-weight: 600; }
tbody th { position: sticky; left: 0; background: var(--paper); max-width: 45vw; white-space: normal; min-width: 6rem; }
tbody tr:nth-child(even) > * { background: var(--band); }
button { font: inherit; font-weight: 600; color: var(--link); background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit; }
button:focus-visible, .table:focus-visible { outline: 2px solid var(--link); }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
figure { margin: 2rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; }
figcaption { color: var(--faint); }
"""

# Numbers by their value (12.3% and 1.5e-3 too, but not 3.24 MB), all else as text; a second click turns the order.
SCRIPT = """
const valueOf = (text) => { const found = /^[-+]?[0-9.,]+(e[-+]?[0-9]+)?/i.exec(text.trim());
  return found ? parseFloat(found[0].replaceAll(",", "")) : NaN; };
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
    const place = [...head.parentNode.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const compare = (a, b) => {
      const [x, y] = [a, b].map((row) => row.cells[place].textContent);
      const [p, q] = [valueOf(x), valueOf(y)];
      return Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
    };
    const rows = [...body.rows].sort((a, b) => (up ? compare(a, b) : compare(b, a)));
    for (const row of rows) body.append(row);
  });
}
"""
