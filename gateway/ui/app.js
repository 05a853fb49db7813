// Asks the gateway every second, follows the rounds of one replica, and survives a gateway that goes and comes back.

import { events, getJson, token } from "./api.js";
import { byId, element } from "./dom.js";
import { Lanes } from "./lanes.js";
import { showAcceptance, showEvents, showReplicas, showRequests, showTiers, showTopology, Tiles } from "./panels.js";
import { Playground } from "./playground.js";
import { totalOf, viewsOf } from "./rates.js";

const POLL_MS = 1000;
const RETRY_MS = 1000;
const KEPT_READINGS = 60;

const lanes = new Lanes(byId("lanes"));
const tiles = new Tiles(byId("tiles"));
let readings = []; // of the last minute: { atMs, answer }
let watching = null; // aborts what runs for the page while it is seen
let isTokenRefused = false; // the person was asked for another one
let roundsProblem = "";

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function say(state, text) {
  const pill = byId("state");
  if (pill.textContent !== text) pill.textContent = text;
  pill.dataset.state = state;
}

// -- the token

function askForToken(why) {
  const dialog = byId("token-dialog");
  if (why) byId("token-why").textContent = why;
  byId("token").value = token.get();
  if (!dialog.open) dialog.showModal();
}

function onProblem(error) {
  if (error.status === 401) {
    say("warn", "A token is needed");
    if (!isTokenRefused) askForToken(token.get() ? "This token is not known here." : "");
    isTokenRefused = true;
  } else if (error.status === 403) say("warn", "The token has not the scope that this needs");
  else if (error.status === 0) say("bad", "The gateway does not answer; trying again");
  else say("bad", error.message);
}

byId("token-open").addEventListener("click", () => askForToken(""));
byId("token-cancel").addEventListener("click", () => byId("token-dialog").close());
byId("token-form").addEventListener("submit", () => {
  token.set(byId("token").value.trim());
  isTokenRefused = false;
  restart();
});

// -- the status

async function follow(signal) {
  while (!signal.aborted) {
    const began = performance.now();
    try {
      take({ atMs: performance.now(), answer: await getJson("/control/status", signal) });
      say("good", "Live");
    } catch (error) {
      if (error.name === "AbortError") return;
      onProblem(error);
      readings = [];
    }
    await sleep(Math.max(100, POLL_MS - (performance.now() - began)));
  }
}

function take(reading) {
  const before = readings.at(-1);
  const elapsedS = before ? (reading.atMs - before.atMs) / 1000 : 0;
  readings = [...readings, reading].slice(-KEPT_READINGS);
  const { answer } = reading;
  const views = viewsOf(before?.answer, answer, elapsedS);
  const total = totalOf(views);
  byId("model").textContent = answer.model ?? "";
  document.title = `${answer.model ?? ""} · Echelon`;
  tiles.show(total);
  showReplicas(views);
  showRequests(answer, total);
  showEvents(answer);
  showTopology(answer);
  offerReplicas(answer.replicas ?? []);
  const of = (each) => (each?.answer.replicas ?? []).find((replica) => (replica.replica ?? 0) === chosen())?.status;
  showAcceptance(of(reading), of(readings[0]));
  showTiers(of(before), of(reading), elapsedS);
}

const chosen = () => Number(byId("replica").value || 0);

function offerReplicas(replicas) {
  const select = byId("replica");
  byId("replica-choice").hidden = replicas.length < 2;
  if (select.options.length === replicas.length) return;
  const value = select.value;
  select.replaceChildren(...replicas.map((_, i) => element("option", { value: String(i) }, String(i))));
  if (value && Number(value) < replicas.length) select.value = value;
}

// -- rounds

async function followRounds(signal) {
  while (!signal.aborted) {
    try {
      lanes.restart();
      for await (const data of events(`/control/rounds?replica=${chosen()}`, { signal })) {
        const batch = JSON.parse(data);
        if (batch.error) throw new Error(batch.error.message);
        lanes.add(batch);
        roundsProblem = "";
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      roundsProblem = `No rounds: ${error.message}.`;
    }
    await sleep(RETRY_MS);
  }
}

let describedMs = 0;
let drawnMs = 0;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

function draw(nowMs) {
  if (!document.hidden && nowMs - drawnMs > (calm.matches ? 500 : 30)) {
    drawnMs = nowMs;
    lanes.draw();
  }
  if (nowMs - describedMs > 1000) {
    describedMs = nowMs;
    const text = roundsProblem || lanes.describe();
    byId("lanes-text").textContent = text;
    byId("lanes").setAttribute("aria-label", `Rounds of draft and target over time. ${text}`);
  }
  requestAnimationFrame(draw);
}

byId("pause").addEventListener("click", (event) => {
  const isPaused = event.currentTarget.getAttribute("aria-pressed") !== "true";
  event.currentTarget.setAttribute("aria-pressed", String(isPaused));
  lanes.paused = isPaused;
});
byId("span").addEventListener("change", (event) => (lanes.spanMs = Number(event.currentTarget.value)));
byId("replica").addEventListener("change", restart);

// -- a page that is not seen asks for nothing

function restart() {
  watching?.abort();
  watching = null;
  if (document.hidden) return;
  watching = new AbortController();
  readings = [];
  follow(watching.signal);
  followRounds(watching.signal);
}

document.addEventListener("visibilitychange", restart);

// -- light and dark

const theme = byId("theme");

function setTheme(value) {
  if (value) document.documentElement.dataset.theme = value;
  else delete document.documentElement.dataset.theme;
}

theme.value = localStorage.getItem("echelon-theme") ?? "";
setTheme(theme.value);
theme.addEventListener("change", () => {
  localStorage.setItem("echelon-theme", theme.value);
  setTheme(theme.value);
});

new Playground(onProblem);
restart();
requestAnimationFrame(draw);
