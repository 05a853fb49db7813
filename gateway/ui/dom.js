// Elements and numbers, written briefly.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const element = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** Makes these the content, unless they are already: what a reader has selected, and where they read, stays. */
export function show(node, ...children) {
  const next = node.cloneNode(false);
  next.append(...children);
  if (!node.isEqualNode(next)) node.replaceChildren(...next.childNodes);
}

/** The same for a text: a screen reader tells only what is new. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function table(caption, headings, rows, classes = []) {
  const cells = (row) => row.map((value, i) => element("td", { class: classes[i] ?? null, title: classes[i] ? value : null }, value));
  return element(
    "table", {},
    element("caption", { class: "hidden" }, caption),
    element("thead", {}, element("tr", {}, ...headings.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row)))),
  );
}

/** Cells of a grid: a name, a bar from 0 to 1, a value. `spoken`: the name for those who do not see it. */
export function bar(name, share, value, kind, spoken = name) {
  const width = `${100 * Math.min(1, Math.max(0, share))}%`;
  const label = `${spoken}: ${value}`;
  return [
    element("span", { class: "key", "aria-hidden": "true" }, name),
    element("span", { class: kind ?? null, role: "img", "aria-label": label }, svg("svg", {}, svg("rect", { width, height: "100%" }))),
    element("span", { class: "value", "aria-hidden": "true" }, value),
  ];
}

export const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);
export const decimal = (value, digits = 1) => (value === null ? "–" : value.toFixed(digits));
export const rate = (value) => (value === null ? "–" : value >= 100 ? value.toFixed(0) : value.toFixed(1));

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count >= 100 || unit === 0 ? count.toFixed(0) : count.toFixed(1)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds >= 3600) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}
