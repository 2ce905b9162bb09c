// The file or link that was opened last, its decode and its pictures.

import * as api from "./api.js";
import * as comparison from "./comparison.js";
import { view } from "./comparison.js";
import * as link from "./link.js";
import * as panel from "./panel.js";
import { $, fields } from "./panel.js";

const POLL_MS = 5000; // for the queue position
const FALLBACK = [ // problems after which the instant tier is used
  "queue-away", "queue-full", "busy", "too-many-requests", "parameter-error", "quarantined",
];
const PHOTO = /^(\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftyp)/s; // first bytes

let current = null;
let lastSample = null;

class Session {
  photo = null;
  original = null; // bitmap of the photo
  bitstream = null;
  waiting = false; // until the queue is back
  following = false; // reads a job's events
  withdrawal = null; // promise: the last job canceled
  #job = new AbortController(); // for its requests

  constructor(name, id = "", bytes = 0) {
    Object.assign(this, { name, id, bytes, tier: "" });
  }

  get signal() {
    return this.#job.signal;
  }

  // Abort the previous decode; returns the signal of the next.
  #restart() {
    this.#job.abort();
    if (this === current) this.#job = new AbortController();
    this.signal.throwIfAborted();
    return this.signal;
  }

  close() {
    this.#job.abort();
    this.original?.close();
  }

  // Cancel the job if nobody would see its picture.
  withdraw() {
    const unseen = this.following && this.bitstream && !link.wasCopied(this.id);
    return unseen ? api.cancel(this.id).catch(() => null) : null;
  }

  /* From a file to a bitstream */

  async open(file) {
    const head = String.fromCharCode(...new Uint8Array(await file.slice(0, 12).arrayBuffer()));
    this.signal.throwIfAborted();
    const photo = file.type.startsWith("image/") || PHOTO.test(head);
    const coded = head.startsWith("\x8dMSH") || !photo;
    $("qualities").hidden = coded;
    this[coded ? "bitstream" : "photo"] = file;
    await (coded ? this.#inspect() : this.encode());
  }

  async encode() {
    const signal = this.#restart();
    const quality = fields.quality.value;
    this.waiting = false;
    panel.hide("cancel");
    panel.showProgress(0);
    panel.showStatus("encoding");
    if (!this.original) {
      const { toPlain } = await import("./upright.js");
      const original = await toPlain(this.photo).catch(() => null);
      if (this.original || this !== current) original?.close();
      else this.original = original;
    }
    signal.throwIfAborted();
    const { original } = this;
    if (original && !view.width) comparison.setSize(original.width, original.height);
    if (original && !view.pictures.has("original")) {
      comparison.put("original", await toBitmap(original, signal));
      comparison.setRow("original", this.photo.size);
      this.#refresh();
    }
    const { bitstream, warning } = await api.encode(this.photo, quality, signal);
    Object.assign(this, { bitstream, quality });
    if (warning) panel.showProblem({ title: "Damaged photo", message: warning });
    await this.#inspect();
  }

  async #inspect() {
    const { width, height, bytes } = await api.inspect(this.bitstream, this.signal);
    if (view.width !== width || view.height !== height) comparison.setSize(width, height);
    this.bytes = bytes;
    comparison.setRow("instant", bytes);
    await this.decode();
  }

  /* From a bitstream to pictures */

  // Apply the settings; a changed quality needs another bitstream.
  update() {
    return this.photo && this.quality !== fields.quality.value ? this.encode() : this.decode();
  }

  async decode() {
    const signal = this.#restart();
    this.withdrawal = this.withdraw() ?? this.withdrawal;
    Object.assign(this, { waiting: false, following: false });
    if (!view.pictures.has("drawn")) panel.showStatus("decoding");
    panel.hide("cancel");
    await Promise.all([this.withdrawal, panel.loadTiers()]);
    const tier = fields.tier.value;
    const { result, refusal } = await this.#request(tier, signal);
    const received = performance.now();
    const pending = Boolean(result.id) && result.tier === "instant";
    Object.assign(this, { id: result.id, tier, following: pending });
    const bitmap = await toBitmap(result.file, signal);
    link.write(this.id, this.bytes);
    if (result.tier === "instant") this.#showDraft(bitmap, result.ms, received);
    else await this.#showCached(bitmap, result.ms, signal);
    this.#refresh();
    if (pending) await this.#follow();
    else panel.hideProgress();
    if (refusal && !this.waiting) panel.showProblem(refusal, () => this.update());
  }

  // The tier's picture or draft; if refused, the instant picture and the problem.
  async #request(tier, signal) {
    try {
      const sent = api.decode(this.bitstream, tier, fields.seed.value || 0);
      // not aborted: only its response has the id to cancel
      this.withdrawal = sent.then((result) =>
        signal.aborted && result.id && result.tier === "instant" ? api.cancel(result.id) : null,
      ).catch(() => null);
      const result = await sent;
      signal.throwIfAborted();
      return { result };
    } catch (refusal) {
      signal.throwIfAborted();
      if (!FALLBACK.includes(refusal.kind)) throw refusal;
      const result = await api.decode(this.bitstream, "instant", 0, signal).catch((e) => {
        throw e.name === "AbortError" ? e : refusal;
      });
      this.waiting = refusal.kind === "queue-away";
      if (this.waiting) $("away").hidden = false;
      return { result, refusal };
    }
  }

  #showDraft(bitmap, ms, received) {
    view.drop("drawn");
    comparison.put("instant", bitmap);
    this.instant = this.bitstream;
    $("times").textContent = `Instant: ${Math.round(ms)} ms`;
    view.addEventListener("paint", () => {
      performance.measure("draft", { start: received });
      this.#compareFormats();
    }, { once: true });
  }

  async #loadInstant(signal) {
    comparison.put("instant", await toBitmap(api.image(this.id, 0, "instant", signal), signal));
    this.instant = this.bitstream;
  }

  async #showCached(bitmap, ms, signal) {
    comparison.put("drawn", bitmap, true);
    $("times").textContent = `From the cache: ${Math.round(ms)} ms`;
    if (this.instant !== this.bitstream) await this.#loadInstant(signal);
    this.#compareFormats();
  }

  #compareFormats() {
    if (!this.original || this.compared === this.bitstream || this !== current) return;
    this.compared = this.bitstream;
    comparison.compareFormats(this.original, this.bytes);
  }

  // Show the decode that a link names.
  async find() {
    const { id, signal } = this;
    const state = await api.status(id, signal).catch((e) => {
      if (e.kind === "picture-gone") e.retry = () => requeue(id).then(() => openLink(id, this.bytes));
      throw e;
    });
    await panel.loadTiers();
    this.tier = state.tier;
    fields.tier.value = state.tier;
    fields.seed.value = state.seed_text;
    panel.describeTier();
    comparison.setSize(state.width, state.height);
    if (this.bytes) comparison.setRow("instant", this.bytes);
    await this.#loadInstant(signal);
    this.#refresh();
    link.write(id, this.bytes);
    if (state.status === "succeeded") await this.#finish(false);
    else if (["failed", "canceled"].includes(state.status)) this.#showEnd(state);
    else await this.#follow();
  }

  #refresh() {
    comparison.setDiffusion(this.tier, Boolean(this.id));
    comparison.refresh();
    panel.enableSettings(Boolean(this.bitstream));
  }

  /* A queued job */

  async #follow() {
    const { signal } = this;
    const start = performance.now();
    panel.showProgress(0);
    panel.showStatus("queued");
    $("cancel").hidden = false;
    const poll = setInterval(() => this.#showPosition(), POLL_MS);
    Object.assign(this, { step: 0, eta: null, following: true });
    this.#showPosition();
    try {
      for await (const event of api.events(this.id, signal)) {
        if (["progress", "preview"].includes(event.kind)) this.#showStep(event.step, event.total);
        if (event.kind === "preview") {
          const file = api.preview(event.image, signal);
          const bitmap = await toBitmap(file, signal).catch(() => null);
          if (bitmap) comparison.put("drawn", bitmap, true);
        }
        if (event.kind === "completed") {
          await this.#finish(true);
          const seconds = ((performance.now() - start) / 1000).toFixed(1);
          if (this.bitstream) $("times").textContent += `; final: ${seconds} s`;
        }
        if (["failed", "canceled"].includes(event.kind)) {
          this.#showEnd(await api.status(this.id, signal));
        }
      }
      this.following = false;
    } finally {
      clearInterval(poll);
    }
  }

  #showStep(step, total) {
    if (!step) return;
    this.step = step;
    panel.showProgress(step / total);
    panel.showStatus(`step ${step} of ${total}${this.#remaining()}`, false);
  }

  #remaining() {
    const s = this.eta ? this.eta.s - (performance.now() - this.eta.at) / 1000 : 0;
    if (s < 0.5) return "";
    return s < 90 ? `, ${Math.round(s)} s left` : `, ${Math.round(s / 60)} min left`;
  }

  async #showPosition() {
    if (this.polling) return;
    const { signal } = this;
    this.polling = true;
    const state = await api.status(this.id, signal).catch(() => null);
    this.polling = false;
    if (!state || this.signal.aborted) return;
    this.eta = state.eta_s && { s: state.eta_s, at: performance.now() };
    if (state.status !== "queued" || this.step) return;
    const place = state.position ? `${state.position} ahead in the queue` : "next in the queue";
    panel.showStatus(place + this.#remaining());
  }

  async #finish(fade) {
    const { id, signal } = this;
    const bitmap = await toBitmap(api.image(id, 1, this.tier, signal), signal);
    comparison.put("drawn", bitmap, fade);
    this.#refresh();
    panel.hideProgress();
  }

  #showEnd({ status, error }) {
    panel.hideProgress();
    const title = status === "canceled" ? "Cancelled" : "The decode failed";
    panel.showProblem({ title, message: error ?? "" }, async () => {
      if (this.bitstream) return this.decode();
      this.#restart();
      await requeue(this.id);
      await this.#follow();
    });
  }

  async cancel() {
    panel.hide("cancel");
    const { status, stopping } = await api.cancel(this.id);
    if (this !== current || stopping || status === "canceled") return; // an event follows
    this.#job.abort();
    this.following = false;
    this.#showEnd({ status: "canceled", error: "Others wait for it, so it is still decoded." });
  }
}

// Queue a job again unless another client did (409).
const requeue = (id) => api.retry(id).catch((e) => {
  if (e.status !== 409) throw e;
});

async function toBitmap(file, signal) {
  const bitmap = await createImageBitmap(await file);
  if (signal.aborted) bitmap.close();
  signal.throwIfAborted();
  return bitmap;
}

function begin(session) {
  session.withdrawal = current?.withdraw() ?? null;
  current?.close();
  current = session;
  comparison.reset();
  panel.enableSettings(true);
  panel.hideProblem();
  panel.hideProgress();
  panel.showFile(session.name);
  link.write(session.id, session.bytes);
  return session;
}

// Run `work`; show its error unless another file was opened.
export async function attempt(work) {
  const session = current;
  panel.setBusy(true);
  try {
    panel.hideProblem();
    await work();
  } catch (e) {
    if (e.name === "AbortError" || session !== current) return;
    panel.hideProgress();
    panel.showStage(view.pictures.size > 0);
    panel.showProblem(e, e.retry ?? work);
  } finally {
    panel.setBusy(false);
  }
}

export function openFile(file, name = file.name || "pasted picture") {
  const session = begin(new Session(name));
  return attempt(() => session.open(file));
}

export function openLink(id, bytes) {
  const session = begin(new Session("From a link", id, bytes));
  return attempt(() => session.find());
}

export function openSample(sample, name) {
  return attempt(async () => {
    const [request, before] = [(lastSample = {}), current];
    panel.showStatus("loading");
    const file = await (await api.request(`web/samples/${sample}.webp`)).blob();
    if (request === lastSample && before === current) await openFile(file, name);
  });
}

const update = () => attempt(() => current.update());

export const cancel = () => current.cancel();
export const changeQuality = () => current?.photo && attempt(() => current.encode());
export const changeSettings = () => current?.bitstream && update();
export const resume = () => current?.waiting && update(); // the queue is back
