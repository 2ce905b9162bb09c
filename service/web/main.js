// The page: what was chosen, where its decode stands, and what is shown of it.

import * as api from "./api.js";
import { View } from "./view.js";

const $ = (id) => document.getElementById(id);
const knobs = $("knobs").elements;
const view = new View($("canvas"));
const count = new Intl.NumberFormat("en");
const NAMES = { original: "Original", jpeg: "JPEG", webp: "WebP", instant: "Instant", drawn: "Drawn" };
const HEALTH_MS = 5000;
const PLACE_MS = 5000; // between questions about a place in the queue
const FINAL = [400, 401, 403, 413, 415, 422]; // what another try does not change
const REFUSED = [ // but not the instant picture
  "queue-away", "queue-full", "busy", "too-many-requests", "parameter-error", "quarantined",
];
const PHOTO = /^(\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftyp)/s; // files without a type

const sought = { left: "instant", right: "drawn" }; // to be compared, once they are there
let tiers = [];
let shown = null; // what is chosen; another object after every choice
let rivals = null; // the worker
let missed = null; // what failed and may be tried again
let working = 0; // attempts that go on
let clicked = null; // the sample that was, last

class Shown {
  constructor(name) {
    Object.assign(this, { name, photo: null, bitstream: null, id: "", bytes: 0, rows: {} });
    Object.assign(this, { following: false, copied: "" }); // an id whose link was copied
    this.left = null; // what withdraws the decode before
    this.stop = new AbortController(); // of everything
    this.job = new AbortController(); // of one decode
  }

  // Another decode, whose signal is returned; AbortError where something else was chosen meanwhile.
  renew() {
    this.stop.signal.throwIfAborted();
    this.job.abort();
    this.job = new AbortController();
    return this.job.signal;
  }

  end() {
    this.stop.abort();
    this.job.abort();
    this.original?.close();
  }
}

/* From a file to pictures */

function open(file, name) {
  const own = begin(new Shown(name || file.name || "pasted"));
  return attempt(async () => {
    const head = String.fromCharCode(...new Uint8Array(await file.slice(0, 12).arrayBuffer()));
    own.stop.signal.throwIfAborted();
    const photo = file.type.startsWith("image/") || PHOTO.test(head);
    const coded = head.startsWith("\x8dMSH") || !photo;
    $("qualities").hidden = coded;
    own[coded ? "bitstream" : "photo"] = file;
    await (coded ? describe(own) : encode(own));
  });
}

async function encode(own) {
  const signal = own.renew();
  const quality = knobs.quality.value;
  own.waiting = false;
  hide("cancel");
  ring(0);
  say("encoding");
  if (!own.original) {
    const original = await flat(own.photo).catch(() => null);
    if (own.original || own.stop.signal.aborted) original?.close();
    else own.original = original;
  }
  signal.throwIfAborted();
  if (own.original && !view.width) size(own.original.width, own.original.height);
  if (own.original && !view.pictures.has("original")) {
    put("original", await fetched(own.original, signal));
    row("original", own.photo.size);
    choices();
  }
  own.bitstream = await api.encode(own.photo, quality, signal);
  own.quality = quality;
  await describe(own);
}

// A photograph on white, as the service flattens what is transparent.
async function flat(photo) {
  const bitmap = await createImageBitmap(photo);
  if (photo.type === "image/jpeg") return bitmap;
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.transferToImageBitmap();
}

async function describe(own) {
  const { width, height, bytes } = await api.inspect(own.bitstream, own.job.signal);
  if (view.width !== width || view.height !== height) size(width, height);
  own.bytes = bytes;
  row("instant", bytes);
  await decode(own);
}

// What the knobs say.
const current = (own) =>
  own.photo && own.quality !== knobs.quality.value ? encode(own) : decode(own);

// Nobody would see the decode that goes on; but a link's belongs to who made it.
function leave(own) {
  const unseen = own?.following && own.bitstream && own.copied !== own.id;
  return unseen ? api.withdraw(own.id).catch(() => null) : null;
}

async function decode(own) {
  const signal = own.renew();
  own.left = leave(own) ?? own.left;
  Object.assign(own, { waiting: false, following: false });
  if (!view.pictures.has("drawn")) say("decoding");
  hide("cancel");
  await Promise.all([own.left, known()]);
  const tier = knobs.tier.value;
  let answer;
  let refusal = null;
  try {
    const asked = api.decode(own.bitstream, tier, knobs.seed.value || 0);
    own.left = asked.then((a) => // it is queued, whatever was chosen meanwhile
      signal.aborted && a.id && a.tier === "instant" ? api.withdraw(a.id) : null).catch(() => null);
    answer = await asked;
    signal.throwIfAborted();
  } catch (e) {
    signal.throwIfAborted();
    if (!REFUSED.includes(e.kind)) throw e;
    refusal = e;
    answer = await api.decode(own.bitstream, "instant", 0, signal).catch((other) => {
      throw other.name === "AbortError" ? other : e;
    });
    own.waiting = e.kind === "queue-away";
    if (own.waiting) $("away").hidden = false;
  }
  const answered = performance.now();
  const pending = Boolean(answer.id) && answer.tier === "instant";
  Object.assign(own, { id: answer.id ?? "", tier, following: pending });
  const bitmap = await fetched(answer.file, signal);
  remember(own);
  if (answer.tier === "instant") {
    view.drop("drawn");
    put("instant", bitmap);
    own.instant = own.bitstream;
    $("times").textContent = `Instant: ${Math.round(answer.ms)} ms`;
    view.addEventListener("drawn", () => {
      performance.measure("draft", { start: answered });
      compete(own);
    }, { once: true });
  } else {
    put("drawn", bitmap, true);
    $("times").textContent = `Drawn before: here in ${Math.round(answer.ms)} ms`;
    if (own.instant !== own.bitstream) { // else it is there already
      put("instant", await fetched(api.image(own.id, 0, "instant", signal), signal));
      own.instant = own.bitstream;
    }
    compete(own);
  }
  choices();
  if (pending) await follow(own);
  else quiet();
  if (refusal && !own.waiting) complain(refusal, () => current(own));
}

// A decode that a link names.
async function find(id, bytes) {
  const own = begin(Object.assign(new Shown("from a link"), { id, bytes }));
  await attempt(async () => {
    const { signal } = own.job;
    const state = await api.status(id, signal).catch((e) => {
      if (e.kind === "picture-gone") e.work = () => retried(id).then(() => find(id, bytes));
      throw e;
    });
    await known();
    own.tier = state.tier;
    knobs.tier.value = state.tier;
    knobs.seed.value = state.seed;
    about();
    size(state.width, state.height);
    if (bytes) row("instant", bytes);
    put("instant", await fetched(api.image(id, 0, "instant", signal), signal));
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
  Object.assign(own, { step: 0, eta: null, following: true });
  place(own);
  try {
    for await (const event of api.events(own.id, signal)) {
      if (["progress", "preview"].includes(event.kind)) steps(own, event.step, event.total);
      if (event.kind === "preview") {
        const bitmap = await fetched(api.preview(event.image, signal), signal).catch(() => null);
        if (bitmap) put("drawn", bitmap, true);
      }
      if (event.kind === "completed") {
        await finish(own, true);
        const seconds = ((performance.now() - began) / 1000).toFixed(1);
        if (own.bitstream) $("times").textContent += `; drawn: ${seconds} s`; // else it began before
      }
      if (["failed", "canceled"].includes(event.kind)) stopped(own, await api.status(own.id, signal));
    }
    own.following = false;
  } finally {
    clearInterval(places);
  }
}

async function finish(own, fade) {
  const { signal } = own.job;
  put("drawn", await fetched(api.image(own.id, 1, own.tier, signal), signal), fade);
  choices();
  quiet();
}

function stopped(own, { status, error }) {
  quiet();
  if (status === "canceled") complain({ title: "Withdrawn", message: error ?? "" }, again);
  else complain({ title: "The drawing failed", message: error ?? "" }, again);

  async function again() {
    if (own.bitstream) return decode(own); // takes hold, too, of what is still drawn for others
    own.renew();
    await retried(own.id);
    await follow(own);
  }
}

// Queued again, unless somebody else was quicker.
const retried = (id) => api.retry(id).catch((e) => {
  if (e.status !== 409) throw e;
});

async function cancel(own) {
  hide("cancel");
  const { status, stopping } = await api.withdraw(own.id);
  if (own !== shown || stopping || status === "canceled") return; // the events tell
  own.job.abort();
  own.following = false;
  stopped(own, { status: "canceled", error: "It is still drawn for others who wait." });
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
  choices();
  const worker = new Worker(new URL("rivals.js", import.meta.url));
  rivals = worker;
  worker.onmessage = async ({ data: { type, file, quality } }) => {
    const name = type.split("/")[1];
    const bitmap = file && await createImageBitmap(file).catch(() => null);
    if (own !== shown) return void bitmap?.close();
    if (!bitmap) {
      row(name, NaN, "not written by this browser");
      choices();
      return;
    }
    const least = file.size > own.bytes;
    put(name, bitmap);
    row(name, file.size, least ? "its smallest" : `quality ${Math.round(100 * quality)}`);
    choices();
  };
  createImageBitmap(own.original).then((bitmap) => {
    const types = ["image/jpeg", "image/webp"];
    worker.postMessage({ bitmap, bytes: own.bytes, types }, [bitmap]);
  }, () => {}); // something else was chosen
}

/* What is on the page */

function begin(next) {
  next.left = leave(shown);
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

async function fetched(file, signal) {
  const bitmap = await createImageBitmap(await file);
  if (signal.aborted) bitmap.close();
  signal.throwIfAborted();
  return bitmap;
}

function put(name, bitmap, fade) {
  view.put(name, bitmap, fade);
  $("stage").classList.add("full");
  $("welcome").hidden = true;
  $("source").hidden = false;
  if (document.activeElement === document.body) $("canvas").focus({ preventScroll: true });
}

// The picture gets the focus of what is no longer there.
function hide(id) {
  const heir = $("stage").matches(".full") ? "canvas" : "pick";
  if ($(id).contains(document.activeElement)) $(heir).focus({ preventScroll: true });
  $(id).hidden = true;
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
  return shown.tier === "perceptual" ? "Perceptual" : (shown.tier ?? "drawn").toUpperCase();
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
  const [left, right] = [$("left").textContent, $("right").textContent];
  $("canvas").setAttribute("aria-label", view.difference
    ? `What differs between ${left} and ${right}, four times`
    : `${left} left of the divider, ${right} right of it`);
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
  $("progress").setAttribute("aria-valuenow", Math.round(100 * part));
}

// `live`: read out by screen readers, as not every step is.
function say(text, live = true) {
  $("ring").hidden = false;
  $("stand").ariaLive = live ? "polite" : "off";
  $("stand").textContent = text;
}

function steps(own, step, total) {
  if (!step) return;
  own.step = step;
  ring(step / total);
  say(`step ${step} of ${total}${remaining(own)}`, false);
}

// What the service predicted last, less what has passed since.
function remaining({ eta }) {
  const s = eta ? eta.s - (performance.now() - eta.at) / 1000 : 0;
  if (s < 0.5) return "";
  return s < 90 ? `, ${Math.round(s)} s left` : `, ${Math.round(s / 60)} min left`;
}

async function place(own) {
  if (own.placing) return;
  own.placing = true;
  const state = await api.status(own.id, own.job.signal).catch(() => null);
  own.placing = false;
  if (!state || own.job.signal.aborted) return;
  own.eta = state.eta_s && { s: state.eta_s, at: performance.now() };
  if (state.status !== "queued" || own.step) return;
  say((state.position ? `${state.position} before it` : "next in the queue") + remaining(own));
}

function quiet() {
  ring(0);
  hide("ring");
  hide("cancel");
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
  $("key").hidden = ![401, 403].includes(e.status);
  $("retry").hidden = !work || FINAL.includes(e.status);
  if (!$("key").hidden) $("key").elements.key.focus();
}

function settle() {
  hide("problem");
}

/* The queue, when it is away */

async function health() {
  const told = await api.json("readyz").catch(() => null);
  if (!told) return;
  const away = told.redis === "down";
  $("away").hidden = !away;
  await known().catch(() => null);
  if (!away && shown?.waiting) attempt(() => current(shown));
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
    const [mine, before] = [(clicked = {}), shown];
    say("loading");
    const file = await (await api.ask(`web/samples/${button.dataset.sample}.webp`)).blob();
    if (mine === clicked && before === shown) await open(file, button.firstElementChild.alt);
  });
}

$("knobs").onsubmit = (e) => e.preventDefault();
for (const radio of document.getElementsByName("quality")) {
  radio.onchange = () => shown?.photo && attempt(() => encode(shown));
}
const redraw = () => {
  about();
  if (shown?.bitstream) attempt(() => current(shown));
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
$("cancel").onclick = () => cancel(shown).catch((e) => {
  $("cancel").hidden = false;
  complain(e);
});
$("dismiss").onclick = settle;
$("retry").onclick = () => missed && attempt(missed);
$("key").onsubmit = (e) => {
  e.preventDefault();
  const key = $("key").elements.key.value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    complain({ status: 401, title: "No key", message: "A key has no such characters." }, missed);
    return;
  }
  api.useKey(key);
  if (missed) attempt(missed);
};
$("link").onclick = () => navigator.clipboard.writeText(location.href).then(() => {
  shown.copied = shown.id;
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
  $("canvas").classList.toggle("fitted", view.whole);
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
    sides();
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

const linked = () => new URLSearchParams(location.hash.slice(1));

// The tiers, which are asked for once.
async function known() {
  if (tiers.length) return;
  const told = await api.json("v1/tiers");
  if (tiers.length) return;
  tiers = told;
  knobs.tier.replaceChildren(...tiers.map((t) => new Option(t.name, t.name)));
  knobs.tier.value = "perceptual";
  about();
}

async function start() {
  await attempt(known);
  health();
  setInterval(health, HEALTH_MS);
  if (linked().get("decode")) await find(linked().get("decode"), Number(linked().get("bytes")));
}

addEventListener("hashchange", () => {
  const id = linked().get("decode");
  if (id && id !== shown?.id) find(id, Number(linked().get("bytes")));
});
start();
