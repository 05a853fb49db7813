// The rounds of draft and target as they happen: the draft above, the target below, so that overlap is seen.

const DELAY_MS = 500; // behind now, so that rounds are complete when they come into sight
const KEPT_MS = 10_000;
const LEFT = 58; // of the lanes' names, px
const LANES = { draft: { top: 8, height: 52 }, target: { top: 68, height: 52 } };

export class Lanes {
  constructor(canvas) {
    this.canvas = canvas;
    this.spanMs = 2000;
    this.frozen = null; // what is shown instead of what happens, while paused
    this.restart();
  }

  /** A recording begins: its clock has nothing to do with that of the one before. */
  restart() {
    this.happened = { rounds: [], waits: [], moves: [] };
    this.offsetMs = null; // performance.now() minus the recording's clock
  }

  add(batch) {
    const offset = performance.now() - batch.elapsed_us / 1000;
    this.offsetMs = this.offsetMs === null ? offset : Math.min(offset, this.offsetMs + 1);
    const oldest = batch.elapsed_us - 1000 * KEPT_MS;
    const keep = (name, end) =>
      [...this.happened[name], ...batch[name].filter((each) => each.engine in LANES)].filter((each) => end(each) > oldest);
    this.happened = {
      rounds: keep("rounds", (round) => round.received_us),
      waits: keep("waits", (wait) => wait.began_us + wait.run_us),
      moves: keep("moves", (move) => move.received_us),
    };
  }

  set paused(paused) {
    this.frozen = paused ? this.#shown : null;
  }

  get #shown() {
    return this.frozen ?? { ...this.happened, nowMs: this.#nowMs() };
  }

  #nowMs() {
    return this.offsetMs === null ? 0 : performance.now() - this.offsetMs - DELAY_MS;
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const scale = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
    }
    const ink = this.canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    ink.setTransform(scale, 0, 0, scale, 0, 0);
    ink.clearRect(0, 0, width, height);
    const { rounds, waits, moves, nowMs: endMs } = this.#shown;
    const beginMs = endMs - this.spanMs;
    const x = (us) => LEFT + ((us / 1000 - beginMs) / this.spanMs) * (width - LEFT);
    this.#grid(ink, colour, { width, height, beginMs, endMs, x });
    ink.save();
    ink.beginPath();
    ink.rect(LEFT, 0, width - LEFT, height);
    ink.clip();
    for (const wait of waits) this.#wait(ink, colour, x, LANES[wait.engine], wait);
    for (const round of rounds) this.#round(ink, colour, x, LANES[round.engine], round);
    for (const move of moves) this.#move(ink, colour, x, move);
    ink.restore();
    ink.fillStyle = colour("text");
    ink.font = "13px system-ui, sans-serif";
    ink.textBaseline = "middle";
    for (const [name, lane] of Object.entries(LANES)) ink.fillText(name, 0, lane.top + lane.height / 2);
  }

  #grid(ink, colour, { width, height, beginMs, endMs, x }) {
    const stepMs = this.spanMs / 4;
    ink.fillStyle = colour("muted");
    ink.strokeStyle = colour("line");
    ink.lineWidth = 1;
    ink.font = "11px system-ui, sans-serif";
    ink.textBaseline = "alphabetic";
    for (let ms = Math.ceil(beginMs / stepMs) * stepMs; ms <= endMs; ms += stepMs) {
      const at = Math.round(x(1000 * ms)) + 0.5;
      ink.beginPath();
      ink.moveTo(at, 0);
      ink.lineTo(at, height - 18);
      ink.stroke();
      if (ms >= 0 && at < width - 30) ink.fillText(`${(ms / 1000).toFixed(stepMs < 500 ? 3 : 1)} s`, at + 4, height - 4);
    }
  }

  #round(ink, colour, x, lane, round) {
    const [sent, received] = [x(round.sent_us), x(round.received_us)];
    if (received < LEFT) return;
    ink.fillStyle = colour(round.engine);
    ink.globalAlpha = 0.16;
    ink.fillRect(sent, lane.top, received - sent, lane.height);
    ink.globalAlpha = 1;
    const began = x(round.began_us);
    const width = x(round.began_us + round.run_us) - began;
    ink.fillRect(began, lane.top + 6, Math.max(1, width - (width > 3 ? 1 : 0)), lane.height - 12);
  }

  #wait(ink, colour, x, lane, wait) {
    const [begin, end] = [x(wait.began_us), x(wait.began_us + wait.run_us)];
    if (end < LEFT) return;
    ink.strokeStyle = colour("idle");
    ink.beginPath();
    const top = lane.top + 16;
    const size = lane.height - 32;
    for (let at = Math.max(begin, LEFT); at < end; at += 5) {
      ink.moveTo(at, top + size);
      ink.lineTo(Math.min(at + 5, end), top);
    }
    ink.stroke();
  }

  #move(ink, colour, x, move) {
    const [begin, end] = [x(move.sent_us), x(move.received_us)];
    ink.fillStyle = colour("move");
    ink.fillRect(begin, 128 + (move.engine === "draft" ? 0 : 7), Math.max(2, end - begin), 5);
  }

  /** What the chart shows, in words. */
  describe() {
    const shown = this.#shown;
    const endUs = 1000 * shown.nowMs;
    const beginUs = endUs - 1000 * this.spanMs;
    const spans = (engine) =>
      shown.rounds
        .filter((round) => round.engine === engine)
        .map((round) => [Math.max(beginUs, round.began_us), Math.min(endUs, round.began_us + round.run_us)])
        .filter(([begin, end]) => end > begin)
        .sort((a, b) => a[0] - b[0]);
    const [draft, target] = [spans("draft"), spans("target")];
    if (!draft.length && !target.length) return "No rounds in this time.";
    const length = (list) => list.reduce((sum, [begin, end]) => sum + end - begin, 0);
    const share = (us) => `${Math.round((us / (endUs - beginUs)) * 100)} %`;
    const both = overlapOf(draft, target);
    return (
      `Last ${this.spanMs / 1000} s: draft ${draft.length} rounds, busy ${share(length(draft))}; ` +
      `target ${target.length} rounds, busy ${share(length(target))}; both at once ${share(both)}.`
    );
  }
}

/** The time in which both lists of sorted spans are busy. */
function overlapOf(some, others) {
  let [i, j, sum] = [0, 0, 0];
  while (i < some.length && j < others.length) {
    sum += Math.max(0, Math.min(some[i][1], others[j][1]) - Math.max(some[i][0], others[j][0]));
    if (some[i][1] < others[j][1]) i += 1;
    else j += 1;
  }
  return sum;
}
