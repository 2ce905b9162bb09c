// Calls of the API. Errors are Problems.

const RECONNECT_MS = 2000;
let key = sessionStorage.getItem("key") ?? "";

export class Problem extends Error {
  constructor(status, { type = "", title = "No response", detail = "" } = {}) {
    super(detail);
    Object.assign(this, { status, title, kind: type.split(":").pop() });
  }
}

export function useKey(newKey) {
  key = newKey;
  sessionStorage.setItem("key", newKey);
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

// fetch() with the API key. Throws a Problem.
export async function request(path, { headers = {}, ...options } = {}) {
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...authorization } });
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Problem(0, { detail: "The service cannot be reached." });
  }
  if (response.ok) return response;
  if (response.status === 429 && !options.method) {
    await sleep(1000 * (response.headers.get("Retry-After") || 1));
    return request(path, { headers, ...options });
  }
  const problem = await response.json().catch(() => ({}));
  throw new Problem(response.status, { title: `Error ${response.status}`, ...problem });
}

export const json = async (path, options) => (await request(path, options)).json();

const png = { Accept: "image/png" };

// The bitstream of a photo, and a warning if the photo's file is damaged.
export async function encode(file, quality, signal) {
  const path = `v1/encodes?quality=${quality}`;
  const response = await request(path, { method: "POST", body: file, signal });
  return {
    bitstream: await response.blob(),
    warning: response.headers.get("X-Afterimage-Warning"),
  };
}

// The instant picture, or the tier's if it is in the cache, with the id of the decode.
export async function decode(bitstream, tier, seed, signal) {
  const query = new URLSearchParams({ tier, seed });
  const start = performance.now();
  const response = await request(`v1/decodes?${query}`, {
    method: "POST", body: bitstream, headers: png, signal,
  });
  const file = await response.blob();
  return {
    file,
    ms: performance.now() - start,
    id: response.headers.get("Location")?.split("/").pop() ?? "",
    tier: response.headers.get("X-Afterimage-Tier"),
  };
}

export const status = (id, signal) => json(`v1/decodes/${id}`, { signal });
export const inspect = (bitstream, signal) =>
  json("v1/inspect", { method: "POST", body: bitstream, signal });
export const retry = (id) => json(`v1/decodes/${id}/retry`, { method: "POST" });

export async function cancel(id) {
  const response = await request(`v1/decodes/${id}`, { method: "DELETE" });
  return { ...(await response.json()), stopping: response.status === 202 };
}

export async function image(id, realism, minTier, signal) {
  const query = new URLSearchParams({ realism, min_tier: minTier });
  return (await request(`v1/decodes/${id}/image?${query}`, { headers: png, signal })).blob();
}

// `path` may begin with the prefix under which a proxy serves this page.
export const preview = async (path, signal) =>
  (await request(path.replace(/^.*\/(?=v1\/decodes\/)/, ""), { signal })).blob();

// Server-sent events of a decode until it ends; reconnects. EventSource cannot send the API key.
export async function* events(id, signal) {
  let lastId = "0-0";
  for (;;) {
    try {
      const headers = { "Last-Event-ID": lastId, Accept: "text/event-stream" };
      const response = await request(`v1/decodes/${id}/events`, { headers, signal });
      for await (const event of parse(response.body)) {
        lastId = event.id;
        yield event;
        if (["completed", "failed", "canceled"].includes(event.kind)) return;
      }
    } catch (e) {
      const temporary = !(e instanceof Problem) || e.status === 0 || e.status >= 500;
      if (signal.aborted || !temporary) throw e;
    }
    await sleep(RECONNECT_MS);
    signal.throwIfAborted();
  }
}

async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).replaceAll("\r\n", "\n").split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => {
        const colon = line.indexOf(":");
        return [line.slice(0, colon), line.slice(colon + 1).trimStart()];
      }));
      if (fields.data) yield { ...JSON.parse(fields.data), id: fields.id, kind: fields.event };
    }
  }
}
