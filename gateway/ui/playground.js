// Streams a completion and shows which of its tokens were drafted; the last runs with speculation and without stand side by side.

import { events, post } from "./api.js";
import { byId, decimal, duration, element, percent, rate, say } from "./dom.js";

export class Playground {
  constructor(onProblem) {
    this.onProblem = onProblem;
    this.aborting = null;
    this.runs = new Map(); // the last one with speculation, and without
    byId("play").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    byId("stop").addEventListener("click", () => this.aborting?.abort());
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("play").requestSubmit();
    });
  }

  async run() {
    if (this.aborting) return;
    this.aborting = new AbortController();
    this.#busy(true);
    const run = new Run(readForm());
    try {
      await run.stream(this.aborting.signal, (text) => say(byId("play-state"), text));
      this.runs.set(run.asked.speculates, run);
      this.#showRuns();
    } catch (error) {
      if (error.name !== "AbortError") this.onProblem(error);
      byId("play-state").textContent = error.name === "AbortError" ? `Stopped. ${run.summary()}` : `Failed: ${error.message}`;
    } finally {
      this.aborting = null;
      this.#busy(false);
    }
  }

  #busy(isBusy) {
    byId("run").disabled = isBusy;
    byId("stop").disabled = !isBusy;
    byId("output").setAttribute("aria-busy", String(isBusy));
  }

  #showRuns() {
    const rows = [...this.runs.values()].sort((a, b) => b.asked.speculates - a.asked.speculates).map((run) => run.row());
    byId("runs").tBodies[0].replaceChildren(...rows);
    byId("runs").hidden = false;
    byId("same").textContent = this.#comparison();
  }

  #comparison() {
    const [on, off] = [this.runs.get(true), this.runs.get(false)];
    if (!on || !off) return "Run it with the switch the other way to compare.";
    if (on.question() !== off.question()) return "The two runs had different settings.";
    const isSame = on.tokenIds.join() === off.tokenIds.join();
    return isSame ? `Both runs gave the same ${on.tokenIds.length} tokens.` : "The two runs gave different tokens.";
  }
}

function readForm() {
  return {
    prompt: byId("prompt").value,
    isChat: byId("mode").value === "chat",
    maxTokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    seed: Number(byId("seed").value),
    speculates: byId("speculate").checked,
  };
}

class Run {
  constructor(asked) {
    this.asked = asked;
    this.tokenIds = [];
    this.drafted = 0;
    this.rounds = 0;
    this.beganMs = performance.now();
    this.firstMs = null;
    this.lastMs = null;
  }

  /** What two runs must share to be comparable. */
  question() {
    return JSON.stringify({ ...this.asked, speculates: null });
  }

  #body() {
    const { prompt, isChat, maxTokens, temperature, seed, speculates } = this.asked;
    const common = { max_tokens: maxTokens, temperature, seed, stream: true, return_token_ids: true, return_drafted: true };
    if (!speculates) common.speculation = { enabled: false };
    // The text of each token comes with its log-probability.
    return isChat
      ? { ...common, messages: [{ role: "user", content: prompt }], logprobs: true }
      : { ...common, prompt, logprobs: 0 };
  }

  async stream(signal, say) {
    const output = byId("output");
    output.replaceChildren(...(this.asked.isChat ? [] : [element("span", { class: "prompt" }, this.asked.prompt)]));
    say("Waiting for the first token.");
    const path = this.asked.isChat ? "/v1/chat/completions" : "/v1/completions";
    for await (const data of events(path, post(this.#body(), signal))) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const isAtEnd = output.scrollTop + output.clientHeight >= output.scrollHeight - 8;
      for (const choice of event.choices) this.#take(choice, output);
      if (isAtEnd) output.scrollTop = output.scrollHeight;
      if (this.firstMs !== null) say("Streaming.");
    }
    say(`Done. ${this.summary()}`);
  }

  #take(choice, output) {
    const text = choice.text ?? (choice.delta.reasoning ?? "") + (choice.delta.content ?? "");
    const drafted = choice.drafted ?? [];
    this.tokenIds.push(...(choice.token_ids ?? []));
    this.drafted += drafted.filter(Boolean).length;
    this.rounds += drafted.filter((each, i) => !each || i === drafted.length - 1).length;
    if (drafted.length) {
      this.lastMs = performance.now();
      this.firstMs ??= this.lastMs;
    }
    for (const [part, isDrafted] of partsOf(text, tokensOf(choice), drafted)) append(output, part, isDrafted);
  }

  #rate() {
    const seconds = (this.lastMs - this.beganMs) / 1000;
    return this.tokenIds.length && seconds > 0 ? this.tokenIds.length / seconds : null;
  }

  #share() {
    return this.tokenIds.length ? this.drafted / this.tokenIds.length : null;
  }

  summary() {
    if (this.firstMs === null) return "";
    return `${this.tokenIds.length} tokens, ${rate(this.#rate())} a second; ${percent(this.#share())} of them were drafted.`;
  }

  row() {
    const cells = [
      this.asked.speculates ? "on" : "off",
      String(this.tokenIds.length),
      rate(this.#rate()),
      this.firstMs === null ? "–" : duration((this.firstMs - this.beganMs) / 1000),
      percent(this.#share()),
      decimal(this.rounds ? this.tokenIds.length / this.rounds : null, 2),
    ];
    return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
  }
}

function tokensOf(choice) {
  return choice.logprobs?.tokens ?? choice.logprobs?.content?.map((each) => each.token) ?? [];
}

/** The text in pieces, and whether each was drafted. Where tokens do not make up the text (half a character, a stop string
 * that is held back), it is one piece, which counts as drafted if all of its tokens were. */
function partsOf(text, tokens, drafted) {
  if (!text) return [];
  if (tokens.length !== drafted.length || tokens.join("") !== text) return [[text, drafted.length > 0 && drafted.every(Boolean)]];
  return tokens.map((token, i) => [token, drafted[i]]);
}

/** To the last element if that is of the same kind, so that a long output has few of them. */
function append(output, text, isDrafted) {
  const tag = isDrafted ? "mark" : "span";
  const last = output.lastElementChild;
  if (last?.localName === tag && last.className === "") last.firstChild.appendData(text);
  else if (text) output.append(element(tag, {}, text));
}
