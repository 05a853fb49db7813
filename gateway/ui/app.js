// Asks the gateway every second, follows the rounds of one replica, and survives a gateway that goes and comes back.

import { events, getJson, token } from "./api.js";
import { byId, element, say } from "./dom.js";
import { showJobs } from "./jobs.js";
import { Lanes } from "./lanes.js";
import { showAcceptance, showEvents, showReplicas, showRequests, showTiers, showTopology, Tiles } from "./panels.js";
import { Playground } from "./playground.js";
import { totalOf, viewsOf } from "./rates.js";

const POLL_MS = 1000;
const RETRY_MS = 1000;
const REFUSED_MS = 15_000; // a token that is refused is tried less often: each time is a line in the audit log
const SILENCE_MS = 10_000; // four events a second are usual
const KEPT_READINGS = 60;

const lanes = new Lanes(byId("lanes"));
const tiles = new Tiles(byId("tiles"));
let readings = []; // of the last minute: { atMs, answer }
let watching = null; // aborts what runs for the page while it is seen
let isTokenRefused = false; // the person was asked for another one
let roundsProblem = "";

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function sayState(state, text) {
  say(byId("state"), text);
  byId("state").dataset.state = state;
}

// -- the token

const howToAsk = byId("token-why").textContent;

function askForToken(why) {
  const dialog = byId("token-dialog");
  say(byId("token-why"), why || howToAsk);
  if (dialog.open) return;
  byId("token").value = token.get();
  dialog.showModal();
}

function onProblem(error) {
  if (error.status === 401) {
    sayState("warn", "A token is needed");
    if (!isTokenRefused) askForToken(token.get() ? "This token is not known here." : "");
    isTokenRefused = true;
  } else if (error.status === 403) sayState("warn", "The token has not the scope that this needs");
  else if (error.status === 0) sayState("bad", "The gateway does not answer; trying again");
  else sayState("bad", error.message);
}

byId("token-open").addEventListener("click", () => askForToken(""));
byId("token-cancel").addEventListener("click", () => byId("token-dialog").close());
byId("token-form").addEventListener("submit", () => {
  token.set(byId("token").value.trim());
  isTokenRefused = false;
  restart();
});

// -- the status

/** Asks for `path` again and again. */
async function poll(path, signal, take, fail) {
  while (!signal.aborted) {
    const askedMs = performance.now();
    let pauseMs = POLL_MS;
    try {
      take(await getJson(path, signal), askedMs);
    } catch (error) {
      if (error.name === "AbortError") return;
      fail(error);
      pauseMs = pauseAfter(error, POLL_MS);
    }
    await sleep(Math.max(100, pauseMs - (performance.now() - askedMs)));
  }
}

const pauseAfter = (error, usualMs) => ([401, 403].includes(error.status) ? REFUSED_MS : usualMs);

function onStatus(answer, atMs) {
  isTokenRefused = false;
  take({ atMs, answer });
  sayState("good", "Live");
}

function onNoStatus(error) {
  onProblem(error);
  readings = [];
}

function take(reading) {
  const before = readings.at(-1);
  const elapsedS = before ? (reading.atMs - before.atMs) / 1000 : 0;
  readings = [...readings, reading].slice(-KEPT_READINGS);
  const { answer } = reading;
  const views = viewsOf(before?.answer, answer, elapsedS);
  const total = totalOf(views);
  say(byId("model"), answer.model ?? "");
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
  const numbers = replicas.map((replica) => String(replica.replica ?? 0));
  byId("replica-choice").hidden = numbers.length < 2;
  if (numbers.join() === [...select.options].map((option) => option.value).join()) return;
  const value = select.value;
  select.replaceChildren(...numbers.map((number) => element("option", { value: number }, number)));
  if (numbers.includes(value)) select.value = value;
}

// -- rounds

async function followRounds(signal) {
  while (!signal.aborted) {
    let pauseMs = RETRY_MS;
    try {
      lanes.restart();
      for await (const data of events(`/control/rounds?replica=${chosen()}`, { signal }, SILENCE_MS)) {
        const batch = JSON.parse(data);
        if (batch.error) throw new Error(batch.error.message);
        lanes.add(batch);
        roundsProblem = "";
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      roundsProblem = `No rounds: ${error.message}.`;
      pauseMs = pauseAfter(error, RETRY_MS);
    }
    await sleep(pauseMs);
  }
}

let describedMs = 0;
let drawnMs = 0;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

function draw(nowMs) {
  requestAnimationFrame(draw); // first: whatever fails below, the next frame may be better
  if (!document.hidden && nowMs - drawnMs > (calm.matches ? 500 : 30)) {
    drawnMs = nowMs;
    lanes.draw();
  }
  if (nowMs - describedMs > 1000) {
    describedMs = nowMs;
    const text = roundsProblem || lanes.describe();
    say(byId("lanes-text"), text);
    byId("lanes").setAttribute("aria-label", `Rounds of draft and target over time. ${text}`);
  }
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
  poll("/control/status", watching.signal, onStatus, onNoStatus);
  poll("/control/jobs", watching.signal, showJobs, (error) => showJobs({ problem: error.message }));
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
