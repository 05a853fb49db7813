// Everything that is read from one status: tiles, bars, topology, requests, events, replicas.

import { bar, byId, bytes, decimal, duration, element, percent, rate, say, show, svg, table } from "./dom.js";
import { acceptanceByPosition, tiersOf } from "./rates.js";

const POINTS = 120; // of a sparkline, a second each
const TILES = [
  ["tokensPerS", "Tokens/s", rate, "", ""],
  ["running", "Running", String, "", ""],
  ["waiting", "Queue", String, "", ""],
  ["acceptance", "Acceptance", percent, "", "of-draft"],
  ["k", "Drafts verified (k)", decimal, "", "of-draft"],
  ["draftIdle", "Draft idle", percent, "", "of-draft"],
  ["verifyWait", "Verify wait", percent, "", ""],
];

export class Tiles {
  constructor(root) {
    this.history = [];
    this.tiles = TILES.map(([field, name, write, , kind]) => {
      const value = element("dd", { id: `tile-${field}` }, "–");
      const line = svg("path", { d: "" });
      const chart = svg("svg", { viewBox: `0 0 ${POINTS} 26`, preserveAspectRatio: "none", "aria-hidden": "true" }, line);
      root.append(element("dl", { class: `tile ${kind}` }, element("dt", {}, name), value, chart));
      return { field, write, value, line };
    });
  }

  show(total) {
    this.history = [...this.history, total].slice(-POINTS);
    for (const { field, write, value, line } of this.tiles) {
      say(value, total[field] === null ? "–" : write(total[field]));
      line.setAttribute("d", lineOf(this.history.map((each) => each[field])));
    }
  }
}

function lineOf(values) {
  const most = Math.max(...values.map((value) => value ?? 0), 1e-9);
  let pen = "M";
  let path = "";
  values.forEach((value, i) => {
    if (value === null) {
      pen = "M";
      return;
    }
    path += `${pen}${POINTS - values.length + i} ${(25 - 23 * (value / most)).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

export function showAcceptance(status, earlier) {
  const { shares, drafts, isRecent } = acceptanceByPosition(status ?? {}, earlier);
  say(byId("accept-note"), drafts ? `${drafts} verifications ${isRecent ? "in the last minute" : "since the start"}` : "");
  if (!shares.length) {
    show(byId("accept"), element("p", { class: "note" }, "No drafts were verified yet."));
    return;
  }
  const rows = shares.flatMap((share, i) => bar(`draft ${i + 1}`, share, percent(share), "of-draft"));
  show(byId("accept"), element("div", { class: "bars" }, ...rows));
}

export function showTiers(before, status, elapsedS) {
  const rows = tiersOf(before, status ?? {}, elapsedS).flatMap((tier) => {
    const value = tier.text ?? `${bytes(tier.used)} of ${bytes(tier.all)}`;
    const cells = bar(`${tier.engine}, ${tier.tier}`, tier.share, value, tier.engine === "draft" ? "of-draft" : null);
    if (tier.storedPerS || tier.fetchedPerS)
      cells.push(element("span", { class: "more" }, `in ${bytes(tier.storedPerS)}/s, back ${bytes(tier.fetchedPerS)}/s`));
    if (tier.trouble) cells.push(element("span", { class: "more trouble" }, tier.trouble));
    return cells;
  });
  const none = element("p", { class: "note" }, "Not known.");
  show(byId("kv"), rows.length ? element("div", { class: "bars" }, ...rows) : none);
}

const ENGINES = { ENGINE_ROLE_TARGET: "target", ENGINE_ROLE_DRAFT: "draft" };

export function showTopology(answer) {
  const models = (answer.models ?? []).flatMap((model) => {
    const engine = ENGINES[model.engine];
    const ranks = model.num_ranks > 1 ? `, ${model.parallel}-parallel on ${model.num_ranks} ranks` : "";
    return [element("span", { class: `role ${engine}` }, engine), element("span", {}, `${model.model}, ${model.dtype}${ranks}`)];
  });
  if (answer.models?.length === 1) models.push(element("span"), element("span", { class: "note" }, "No draft model."));
  const nodes = groupBy(answer.processes ?? [], (each) => each.node ?? "");
  const boxes = [...nodes].map(([node, processes]) =>
    element(
      "div", { class: "node" },
      element("h3", {}, `node ${node}`),
      element("ul", { class: "chips" }, ...processes.map((process) => chip(process, answer))),
    ),
  );
  if (!boxes.length) boxes.push(element("p", { class: "note" }, "This gateway was not told where its processes run."));
  show(byId("topology"), element("div", { class: "models" }, ...models), ...boxes);
}

function groupBy(items, key) {
  const groups = new Map();
  for (const item of items) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return groups;
}

function chip(process, answer) {
  const replica = (answer.replicas ?? []).find((each) => (each.replica ?? 0) === (process.replica ?? 0));
  const isBoth = (process.engines ?? []).length === 2;
  const isLost = lossOf(process, replica);
  const isWorker = process.role === "target" || process.role === "draft";
  const manyReplicas = (answer.replicas ?? []).length > 1 && process.role !== "gateway";
  const words = [
    isBoth ? "target and draft" : process.role,
    ...(manyReplicas ? [`replica ${process.replica ?? 0}`] : []),
    ...(isWorker ? [`rank ${process.rank ?? 0}`] : []),
  ];
  const small = isLost ? "lost" : (process.devices ?? "");
  const kind = isBoth ? "both" : isWorker ? process.role : "";
  return element("li", { class: `chip ${kind} ${isLost ? "lost" : ""}` }, words.join(" · "), element("small", {}, small));
}

function lossOf(process, replica) {
  if (process.role === "gateway" || !replica) return false;
  if (!replica.status) return process.role === "scheduler";
  return (process.role === "target" && replica.status.target_lost) || (process.role === "draft" && replica.status.draft_lost);
}

const SHOWN_REQUESTS = 10;

export function showRequests(answer, total) {
  const all = answer.requests ?? [];
  const count = total.running + total.waiting;
  say(byId("requests-note"), count ? `${total.running} running, ${total.waiting} waiting` : "");
  if (!all.length) {
    show(byId("requests"), element("p", { class: "note" }, "None runs now."));
    return;
  }
  const hasTenants = all.some((request) => request.tenant);
  const rows = all.slice(0, SHOWN_REQUESTS).map((request) => [
    request.request_id,
    ...(hasTenants ? [request.tenant ?? ""] : []),
    request.waits ? "no token yet" : "streams",
    String(request.num_prompt_tokens ?? 0),
    String(request.num_output_tokens ?? 0),
    duration(request.age_s ?? 0),
  ]);
  const headings = ["Request", ...(hasTenants ? ["Token of"] : []), "State", "Prompt", "Output", "Age"];
  const more = all.length > SHOWN_REQUESTS ? [element("p", { class: "note" }, `The ${SHOWN_REQUESTS} oldest ones are shown.`)] : [];
  show(byId("requests"), table("Running requests", headings, rows, ["id"]), ...more);
}

/** Newest first. */
export function showEvents(answer) {
  const events = answer.events ?? [];
  const lines = events.toReversed().map((event) => {
    const at = new Date(1000 * event.time_s);
    const time = element("time", { datetime: at.toISOString(), title: at.toLocaleString() }, at.toLocaleTimeString());
    const kind = (event.severity ?? "INFO").toLowerCase();
    return element("li", { class: kind }, time, element("b", {}, `${kind === "info" ? "" : `${kind}, `}replica ${event.replica ?? 0}`), element("span", {}, event.text));
  });
  show(byId("events"), ...(lines.length ? lines : [element("li", { class: "note" }, "Nothing has happened yet.")]));
}

export function showReplicas(views) {
  const headings = ["Replica", "State", "Tokens/s", "Running", "Queue", "Acceptance", "k", "Draft idle", "Verify wait", "KV in use"];
  const rows = views.map((view) => [
    String(view.replica),
    view.ready ? "ready" : `not ready: ${view.reason}`,
    rate(view.tokensPerS ?? null),
    String(view.running),
    String(view.waiting),
    percent(view.acceptance ?? null),
    decimal(view.k ?? null),
    percent(view.draftIdle ?? null),
    percent(view.verifyWait ?? null),
    percent(view.kv ?? null),
  ]);
  show(byId("replicas"), table("Replicas", headings, rows));
}
