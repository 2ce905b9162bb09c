// The public API, as a page uses it. Every failure is a Problem, worded by the API.

const RECONNECT_MS = 2000;
let key = sessionStorage.getItem("key") ?? "";

export class Problem extends Error {
  constructor(status, { type = "", title = "No answer", detail = "" } = {}) {
    super(detail);
    Object.assign(this, { status, title, kind: type.split(":").pop() });
  }
}

export function useKey(given) {
  key = given;
  sessionStorage.setItem("key", given);
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// fetch() with the key; Problem unless the answer is a success.
export async function ask(path, { headers = {}, ...rest } = {}) {
  const own = key ? { Authorization: `Bearer ${key}` } : {};
  let answer;
  try {
    answer = await fetch(path, { ...rest, headers: { ...headers, ...own } });
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Problem(0, { detail: "The service cannot be reached." });
  }
  if (answer.ok) return answer;
  if (answer.status === 429 && !rest.method) { // what only asks can wait
    await pause(1000 * (answer.headers.get("Retry-After") || 1));
    return ask(path, { headers, ...rest });
  }
  const told = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, { title: `Error ${answer.status}`, ...told });
}

export const json = async (path, rest) => (await ask(path, rest)).json();

const picture = { Accept: "image/png" };

export async function encode(file, quality, signal) {
  const answer = await ask(`v1/encodes?quality=${quality}`, { method: "POST", body: file, signal });
  return answer.blob();
}

// The instant picture, or the finished one where it is kept, and the id of the decode.
export async function decode(bitstream, tier, seed, signal) {
  const query = new URLSearchParams({ tier, seed });
  const began = performance.now();
  const answer = await ask(`v1/decodes?${query}`, {
    method: "POST", body: bitstream, headers: picture, signal,
  });
  const file = await answer.blob();
  return {
    file,
    ms: performance.now() - began,
    id: answer.headers.get("Location")?.split("/").pop(),
    tier: answer.headers.get("X-Afterimage-Tier"),
  };
}

export const status = (id, signal) => json(`v1/decodes/${id}`, { signal });
export const inspect = (bitstream, signal) =>
  json("v1/inspect", { method: "POST", body: bitstream, signal });
export async function withdraw(id) {
  const answer = await ask(`v1/decodes/${id}`, { method: "DELETE" });
  return { ...(await answer.json()), stopping: answer.status === 202 };
}
export const retry = (id) => json(`v1/decodes/${id}/retry`, { method: "POST" });

export async function image(id, realism, minTier, signal) {
  const query = new URLSearchParams({ realism, min_tier: minTier });
  return (await ask(`v1/decodes/${id}/image?${query}`, { headers: picture, signal })).blob();
}

export const preview = async (path, signal) =>
  (await ask(path.replace(/^\//, ""), { signal })).blob();

// The events of a decode until its end, over broken connections. Not EventSource, which sends no key.
export async function* events(id, signal) {
  let last = "0-0";
  for (;;) {
    try {
      const headers = { "Last-Event-ID": last, Accept: "text/event-stream" };
      const answer = await ask(`v1/decodes/${id}/events`, { headers, signal });
      for await (const event of parse(answer.body)) {
        last = event.id;
        yield event;
        if (["completed", "failed", "canceled"].includes(event.kind)) return;
      }
    } catch (e) {
      const passing = !(e instanceof Problem) || e.status === 0 || e.status >= 500;
      if (signal.aborted || !passing) throw e;
    }
    await pause(RECONNECT_MS);
    signal.throwIfAborted();
  }
}

async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).replaceAll("\r\n", "\n").split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").map((line) => {
        const at = line.indexOf(":");
        return [line.slice(0, at), line.slice(at + 1).trimStart()];
      }));
      if (fields.data) yield { ...JSON.parse(fields.data), id: fields.id, kind: fields.event };
    }
  }
}
