// How the page speaks with its gateway. The token stays in this tab.

const KEY = "echelon-token";

export const token = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the gateway answered instead of what was asked; `status` 0: it did not answer. */
export class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const ANSWER_MS = 10_000; // a gateway that hangs keeps its connections and says nothing

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  const response = await orLost(
    fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" }),
    "the gateway does not answer",
  );
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Problem(response.status, body.error?.message ?? `HTTP ${response.status}`);
  }
  return response;
}

/** What was awaited; whatever fails on the way is a Problem that says `why`. Who aborts it gets the AbortError. */
async function orLost(promise, why) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" || error instanceof Problem ? error : new Problem(0, why);
  }
}

/** Rejects after so long; 0: never. */
async function within(ms, promise) {
  if (!ms) return promise;
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Problem(0, "the gateway says nothing")), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

export async function getJson(path, signal) {
  const response = await ask(path, { signal: AbortSignal.any([signal, AbortSignal.timeout(ANSWER_MS)]) });
  return orLost(response.json(), "the connection was lost");
}

/** The data of each server-sent event. `silenceMs`: after so long without any, the connection counts as lost. */
export async function* events(path, options, silenceMs = 0) {
  const leaving = new AbortController(); // who stops reading, for whatever reason, leaves no connection behind
  const signal = AbortSignal.any([options.signal, leaving.signal]);
  try {
    const response = await within(silenceMs, ask(path, { ...options, signal }));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await orLost(within(silenceMs, reader.read()), "the connection was lost");
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    leaving.abort();
  }
}

export function post(body, signal) {
  return { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal };
}
