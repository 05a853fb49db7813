// Durable jobs: how far each is, how fast it goes, and when it will have ended.

import { bar, byId, duration, element, rate, say, show } from "./dom.js";

const SHORT_ID = 14; // characters

/** `kept`: whether the deployment takes jobs at all; `problem`: why they are not known. */
export function showJobs({ kept = true, jobs = [], problem = "" }) {
  byId("jobs-card").hidden = !kept;
  const numRunning = jobs.filter((job) => !hasEnded(job)).length;
  say(byId("jobs-note"), problem || !jobs.length ? "" : numRunning ? `${numRunning} not ended` : "all ended");
  const note = problem ? `Not known: ${problem}` : "No jobs.";
  const content = jobs.length ? element("div", { class: "bars" }, ...jobs.flatMap(cells)) : element("p", { class: "note" }, note);
  show(byId("jobs"), content);
}

const num = (job, field) => Number(job[field] ?? 0); // protobuf's JSON writes 64-bit integers as text
const hasEnded = (job) => num(job, "ended_at") > 0;

function cells(job) {
  const all = num(job, "num_items");
  const done = num(job, "num_completed") + num(job, "num_failed");
  const id = job.job_id ?? "";
  const short = id.length > SHORT_ID ? `${id.slice(0, SHORT_ID)}…` : id;
  const problem = job.problems?.[0];
  return [
    ...bar(short, all ? done / all : 0, all ? `${done} of ${all}` : "–", null, `Job ${id}`),
    element("span", { class: "more", title: id }, words(job).join(" · ")),
    ...(problem ? [element("span", { class: "more trouble" }, problem.line ? `line ${problem.line}: ${problem.message}` : problem.message)] : []),
  ];
}

function words(job) {
  const failed = num(job, "num_failed");
  return [
    (job.state ?? "").replace("JOB_STATE_", "").toLowerCase().replace("_", " "),
    ...(failed ? [`${failed} errors`] : []),
    ...(job.items_per_s && !hasEnded(job) ? [`${rate(job.items_per_s)} items/s`] : []),
    ...(typeof job.eta_s === "number" && !hasEnded(job) ? [`${duration(job.eta_s)} left`] : []),
    ...(hasEnded(job) ? [`since ${new Date(1000 * num(job, "ended_at")).toLocaleString()}`] : []),
    ...Object.entries(job.metadata ?? {}).map(([name, value]) => `${name}: ${value}`),
  ];
}
