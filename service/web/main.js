// The page: what was chosen, where its decode stands, and what is shown of it.

import * as api from "./api.js";
import { View } from "./view.js";

const $ = (id) => document.getElementById(id);
const knobs = $("knobs").elements;
const view = new View($("canvas"));
const count = new Intl.NumberFormat("en");
const NAMES = { original: "Original", jpeg: "JPEG", webp: "WebP", instant: "Instant", drawn: "Drawn" };
const HEALTH_MS = 5000;
const PLACE_MS = 2000; // between questions about a place in the queue
const FINAL = [400, 401, 403, 413, 415, 422]; // what another try does not change

const sought = { left: "instant", right: "drawn" }; // to be compared, once they are there
let tiers = [];
let shown = null; // what is chosen; another object after every choice
let rivals = null; // the worker
let missed = null; // what failed and may be tried again
let working = 0; // attempts that go on

class Shown {
  constructor(name) {
    Object.assign(this, { name, photo: null, bitstream: null, id: "", bytes: 0, rows: {} });
    this.stop = new AbortController(); // of everything
    this.job = new AbortController(); // of one decode
  }

  end() {
    this.stop.abort();
    this.job.abort();
  }
}

/* From a file to pictures */

function open(file, name) {
  const own = begin(new Shown(name || file.name || "pasted"));
  return attempt(async () => {
    const head = String.fromCharCode(...new Uint8Array(await file.slice(0, 4).arrayBuffer()));
    const coded = head === "\x8dMSH" || !file.type.startsWith("image/");
    $("qualities").hidden = coded;
    own[coded ? "bitstream" : "photo"] = file;
    await (coded ? describe(own) : encode(own));
  });
}

async function encode(own) {
  own.job.abort();
  own.job = new AbortController();
  say("encoding");
  const { signal } = own.job;
  own.original ??= await createImageBitmap(own.photo).catch(() => null);
  if (own.original && !view.width) size(own.original.width, own.original.height);
  if (own.original && !view.pictures.has("original")) {
    put("original", await createImageBitmap(own.original));
    row("original", own.photo.size);
    choices();
  }
  own.bitstream = await api.encode(own.photo, knobs.quality.value, signal);
  await describe(own);
}

async function describe(own) {
  const { width, height, bytes } = await api.inspect(own.bitstream, own.job.signal);
  if (view.width !== width || view.height !== height) size(width, height);
  own.bytes = bytes;
  row("instant", bytes);
  await decode(own);
}

async function decode(own) {
  own.job.abort();
  own.job = new AbortController();
  const { signal } = own.job;
  const tier = knobs.tier.value;
  Object.assign(own, { id: "", tier, waiting: false });
  if (!view.pictures.has("drawn")) say("decoding");
  let answer;
  try {
    answer = await api.decode(own.bitstream, tier, knobs.seed.value || 0, signal);
  } catch (e) {
    if (e.kind !== "queue-away") throw e;
    $("away").hidden = false;
    own.waiting = true; // for the queue
    answer = await api.decode(own.bitstream, "instant", 0, signal);
  }
  const answered = performance.now();
  const bitmap = await createImageBitmap(answer.file);
  if (signal.aborted) return;
  own.id = answer.id ?? "";
  remember(own);
  if (answer.tier === "instant") {
    view.drop("drawn");
    put("instant", bitmap);
    own.instant = own.bitstream;
    view.addEventListener("drawn", () => {
      performance.measure("draft", { start: answered });
      $("times").textContent = `Instant: ${Math.round(answer.ms)} ms`;
      compete(own);
    }, { once: true });
  } else {
    put("drawn", bitmap, true);
    $("times").textContent = `Drawn before: here in ${Math.round(answer.ms)} ms`;
    if (own.instant !== own.bitstream) { // else it is there already
      put("instant", await fetched(api.image(own.id, 0, "instant", signal)));
      own.instant = own.bitstream;
    }
    compete(own);
  }
  choices();
  if (own.id && answer.tier === "instant") await follow(own);
  else quiet();
}

// A decode that a link names.
async function find(id, bytes) {
  const own = begin(Object.assign(new Shown("from a link"), { id, bytes }));
  await attempt(async () => {
    const { signal } = own.job;
    const state = await api.status(id, signal).catch((e) => {
      if (e.kind === "picture-gone") e.work = () => api.retry(id).then(() => find(id, bytes));
      throw e;
    });
    own.tier = state.tier;
    knobs.tier.value = state.tier;
    knobs.seed.value = state.seed;
    about();
    size(state.width, state.height);
    if (bytes) row("instant", bytes);
    put("instant", await fetched(api.image(id, 0, "instant", signal)));
    choices();
    remember(own);
    if (state.status === "succeeded") await finish(own, false);
    else if (["failed", "canceled"].includes(state.status)) stopped(own, state);
    else await follow(own);
  });
}

async function follow(own) {
  const { signal } = own.job;
  const began = performance.now();
  ring(0);
  say("queued");
  $("cancel").hidden = false;
  const places = setInterval(() => place(own), PLACE_MS);
  Object.assign(own, { step: 0, eta: null });
  place(own);
  try {
    for await (const event of api.events(own.id, signal)) {
      if (["progress", "preview"].includes(event.kind)) steps(own, event.step, event.total);
      if (event.kind === "preview") {
        const bitmap = await fetched(api.preview(event.image, signal)).catch(() => null);
        if (bitmap && !signal.aborted) put("drawn", bitmap, true);
      }
      if (event.kind === "completed") {
        await finish(own, true);
        $("times").textContent += `; drawn: ${((performance.now() - began) / 1000).toFixed(1)} s`;
      }
      if (["failed", "canceled"].includes(event.kind)) stopped(own, await api.status(own.id, signal));
    }
  } finally {
    clearInterval(places);
  }
}

async function finish(own, fade) {
  const { signal } = own.job;
  const bitmap = await fetched(api.image(own.id, 1, own.tier, signal));
  if (signal.aborted) return;
  put("drawn", bitmap, fade);
  choices();
  quiet();
}

function stopped(own, { status, error }) {
  quiet();
  if (status === "canceled") complain({ title: "Withdrawn", message: "" }, again);
  else complain({ title: "The drawing failed", message: error ?? "" }, again);

  async function again() {
    own.job = new AbortController();
    await api.retry(own.id);
    await follow(own);
  }
}

/* JPEG and WebP of the same size */

function compete(own) {
  if (!own.original || own.rivals === own.bitstream || own !== shown) return;
  own.rivals = own.bitstream;
  rivals?.terminate();
  for (const name of ["jpeg", "webp"]) {
    view.drop(name);
    row(name, null);
  }
  const worker = new Worker(new URL("rivals.js", import.meta.url));
  rivals = worker;
  worker.onmessage = async ({ data: { type, file, quality } }) => {
    const name = type.split("/")[1];
    if (own !== shown) return;
    if (file === null) {
      row(name, NaN, "not written by this browser");
      choices();
      return;
    }
    const bitmap = await createImageBitmap(file);
    if (own !== shown) return;
    const least = file.size > own.bytes;
    put(name, bitmap);
    row(name, file.size, least ? "its smallest" : `quality ${Math.round(100 * quality)}`);
    choices();
  };
  createImageBitmap(own.original).then((bitmap) => {
    const types = ["image/jpeg", "image/webp"];
    worker.postMessage({ bitmap, bytes: own.bytes, types }, [bitmap]);
  });
}

/* What is on the page */

function begin(next) {
  shown?.end();
  rivals?.terminate();
  shown = next;
  redrawable(true);
  view.clear(0, 0);
  settle();
  quiet();
  remember(next);
  for (const id of ["source", "qualities", "numbers", "compare", "link"]) $(id).hidden = id !== "source";
  $("welcome").hidden = true;
  $("file").textContent = next.name;
  $("size").textContent = "";
  $("times").textContent = "";
  $("rows").replaceChildren();
  return next;
}

function size(width, height) {
  view.clear(width, height);
  $("size").textContent = `${width} × ${height}`;
}

const fetched = async (file) => createImageBitmap(await file);

function put(name, bitmap, fade) {
  view.put(name, bitmap, fade);
  $("stage").classList.add("full");
}

// Which pictures can be compared, those that are being made included.
function choices() {
  const making = { drawn: shown.id, jpeg: shown.rows.jpeg?.made, webp: shown.rows.webp?.made };
  const names = Object.keys(NAMES).filter((n) => view.pictures.has(n) || making[n]);
  for (const [side, wanted] of Object.entries(sought)) {
    knobs[side].replaceChildren(...names.map((name) => new Option(title(name), name)));
    knobs[side].value = [wanted, "instant", ...names].find((name) => names.includes(name));
  }
  $("compare").hidden = names.length < 2;
  redrawable(Boolean(shown.bitstream)); // a link has none
  sides();
  view.draw();
}

function redrawable(can) {
  for (const name of ["tier", "seed", "again"]) knobs[name].disabled = !can;
}

function title(name) {
  if (name !== "drawn") return NAMES[name];
  return shown.tier === "perceptual" ? "Perceptual" : shown.tier.toUpperCase();
}

function sides() {
  view.left = knobs.left.value;
  view.right = knobs.right.value;
  for (const side of ["left", "right"]) {
    const name = view[side];
    const partly = name === "drawn" && view.realism < 1;
    const there = view.pictures.has(name) ? "" : " …";
    $(side).textContent = title(name) + (partly ? ` at ${Math.round(view.realism * 100)} %` : there);
  }
  const said = `${$("left").textContent} left of the divider, ${$("right").textContent} right of it`;
  $("canvas").setAttribute("aria-label", said);
}

// A line of the table; `bytes` is null while the picture is made, NaN where it cannot be.
function row(name, bytes, remark = "") {
  const text = (name === "instant" ? "Bitstream" : NAMES[name]) + (remark && `, ${remark}`);
  const bpp = (8 * bytes) / (view.width * view.height);
  const cells = bytes ? [count.format(bytes), bpp.toFixed(3)] : [bytes === null ? "…" : "–", ""];
  const line = document.createElement("tr");
  line.append(...[text, ...cells].map((cell, i) =>
    Object.assign(document.createElement(i ? "td" : "th"), { textContent: cell })));
  shown.rows[name] = { line, made: !Number.isNaN(bytes) };
  $("rows").replaceChildren(...Object.keys(NAMES).flatMap((n) => shown.rows[n]?.line ?? []));
  $("numbers").hidden = false;
}

function ring(part) {
  $("ring").hidden = false;
  $("arc").style.strokeDashoffset = 100 - 100 * part;
}

function say(text) {
  $("ring").hidden = false;
  $("stand").textContent = text;
}

function steps(own, step, total) {
  if (!step) return;
  own.step = step;
  ring(step / total);
  say(`step ${step} of ${total}${remaining(own)}`);
}

// What the service predicted last, less what has passed since.
function remaining({ eta }) {
  const s = eta ? eta.s - (performance.now() - eta.at) / 1000 : 0;
  if (s < 0.5) return "";
  return s < 90 ? `, ${Math.round(s)} s left` : `, ${Math.round(s / 60)} min left`;
}

async function place(own) {
  const state = await api.status(own.id, own.job.signal).catch(() => null);
  if (!state || own.job.signal.aborted) return;
  own.eta = state.eta_s && { s: state.eta_s, at: performance.now() };
  if (state.status !== "queued" || own.step) return;
  say((state.position ? `${state.position} before it` : "next in the queue") + remaining(own));
}

function quiet() {
  $("ring").hidden = true;
  $("cancel").hidden = true;
}

/* Errors, as the API words them */

async function attempt(work) {
  const own = shown;
  busy(1);
  try {
    settle();
    await work();
  } catch (e) {
    if (e.name === "AbortError" || own !== shown) return;
    quiet();
    const nothing = !view.pictures.size;
    $("welcome").hidden = !nothing;
    $("source").hidden = nothing;
    $("stage").classList.toggle("full", !nothing);
    complain(e, e.work ?? work);
  } finally {
    busy(-1);
  }
}

function busy(more) {
  working += more;
  $("canvas").ariaBusy = working > 0; // not what tells how far it is
}

function complain(e, work) {
  $("problem").hidden = false;
  $("problem").querySelector("strong").textContent = e.title ?? "Something went wrong";
  $("problem").querySelector("span").textContent = e.message;
  missed = work;
  $("key").hidden = e.status !== 401;
  $("retry").hidden = !work || FINAL.includes(e.status);
  if (e.status === 401) $("key").elements.key.focus();
}

function settle() {
  $("problem").hidden = true;
}

/* The queue, when it is away */

async function health() {
  const told = await api.json("readyz").catch(() => null);
  if (!told) return;
  const away = told.redis === "down";
  $("away").hidden = !away;
  if (!away && shown?.waiting) attempt(() => decode(shown));
}

/* What people do */

$("pick").onclick = () => $("chosen").click();
$("other").onclick = () => $("chosen").click();
$("chosen").onchange = () => {
  const [file] = $("chosen").files;
  $("chosen").value = "";
  if (file) open(file);
};
addEventListener("dragover", (e) => {
  e.preventDefault();
  $("stage").classList.add("over");
});
for (const kind of ["dragleave", "drop"]) {
  addEventListener(kind, () => $("stage").classList.remove("over"));
}
addEventListener("drop", (e) => {
  e.preventDefault();
  const [file] = e.dataTransfer.files;
  if (file) open(file);
});
addEventListener("paste", (e) => {
  const [file] = e.clipboardData.files;
  if (file) open(file);
});
for (const button of document.querySelectorAll("[data-sample]")) {
  button.onclick = () => attempt(async () => {
    const name = button.dataset.sample;
    const answer = await api.ask(`web/samples/${name}.webp`);
    await open(await answer.blob(), button.firstElementChild.alt);
  });
}

$("knobs").onsubmit = (e) => e.preventDefault();
for (const radio of document.getElementsByName("quality")) {
  radio.onchange = () => shown?.photo && attempt(() => encode(shown));
}
const redraw = () => {
  about();
  if (shown?.bitstream) attempt(() => decode(shown));
};
knobs.tier.onchange = redraw;
knobs.seed.onchange = redraw;
$("again").onclick = () => {
  knobs.seed.value = Number(knobs.seed.value || 0) + 1;
  redraw();
};
knobs.realism.oninput = () => {
  view.realism = knobs.realism.value / 100;
  $("percent").textContent = `${knobs.realism.value} %`;
  if (shown) sides();
  view.draw("drawn");
};
for (const side of ["left", "right"]) {
  knobs[side].onchange = () => {
    sought[side] = knobs[side].value;
    sides();
    view.draw();
  };
}
$("cancel").onclick = () => api.withdraw(shown.id).catch(complain);
$("dismiss").onclick = settle;
$("retry").onclick = () => missed && attempt(missed);
$("key").onsubmit = (e) => {
  e.preventDefault();
  api.useKey($("key").elements.key.value);
  if (missed) attempt(missed);
};
$("link").onclick = () => navigator.clipboard.writeText(location.href).then(() => {
  $("link").textContent = "Copied";
  setTimeout(() => ($("link").textContent = "Copy link"), 2000);
}, complain);

const split = $("split");
split.oninput = () => {
  view.split = split.value / 100;
  view.draw();
};
view.addEventListener("slide", (e) => {
  split.value = 100 * e.detail;
  split.oninput();
});
view.addEventListener("moved", () => {
  $("zoom").textContent = `${Math.round((100 * view.scale) / devicePixelRatio)} %`;
  $("canvas").classList.toggle("fitted", view.fitted);
});
const tools = {
  in: () => view.zoom(view.scale * 1.5),
  out: () => view.zoom(view.scale / 1.5),
  fit: () => view.fit(),
  one: () => view.zoom(devicePixelRatio),
  difference: () => {
    view.difference = !view.difference;
    $("stage").classList.toggle("difference", view.difference);
    document.querySelector("[data-do=difference]").setAttribute("aria-pressed", view.difference);
    view.draw();
  },
};
for (const button of document.querySelectorAll("[data-do]")) {
  button.onclick = () => view.width && tools[button.dataset.do]();
}
const KEYS = { "+": "in", "=": "in", "-": "out", 0: "fit", 1: "one", d: "difference" };
$("canvas").addEventListener("keydown", (e) => {
  const tool = KEYS[e.key];
  if (!tool || !view.width || e.ctrlKey || e.metaKey) return;
  e.preventDefault();
  tools[tool]();
});

/* Links */

function remember(own) {
  const query = new URLSearchParams({ decode: own.id, bytes: own.bytes });
  history.replaceState(null, "", own.id ? `#${query}` : location.pathname);
  $("link").hidden = !own.id || !navigator.clipboard;
}

function about() {
  $("about").textContent = tiers.find((t) => t.name === knobs.tier.value)?.description ?? "";
}

async function start() {
  await attempt(async () => {
    tiers = await api.json("v1/tiers");
    knobs.tier.replaceChildren(...tiers.map((t) => new Option(t.name, t.name)));
    knobs.tier.value = "perceptual";
    about();
  });
  health();
  setInterval(health, HEALTH_MS);
  const linked = new URLSearchParams(location.hash.slice(1));
  if (linked.get("decode")) await find(linked.get("decode"), Number(linked.get("bytes")));
}

addEventListener("hashchange", () => {
  const linked = new URLSearchParams(location.hash.slice(1)).get("decode");
  if (linked && linked !== shown?.id) find(linked, 0);
});
start();
