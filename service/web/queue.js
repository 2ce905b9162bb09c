// The operators' view of the queue: what waits and runs, read again every two seconds.

import { Problem, json, useKey } from "./api.js";

const POLL_MS = 2000;
const $ = (id) => document.getElementById(id);

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 130000 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

// Heading -> text of a row's cell; headings of text begin with a space.
const COLUMNS = {
  waiting: {
    " priority": (w) => w.priority,
    " caller": (w) => w.caller,
    "jobs": (w) => w.jobs,
    "waits for a worker": (w) => duration(w.unserved_s),
  },
  running: {
    " decode": (job) => job.id,
    " caller": (job) => job.caller,
    " priority": (job) => job.priority,
    " tier": (job) => job.tier,
    " size": (job) => `${job.width} × ${job.height}`,
    " worker": (job) => job.worker,
    "step": (job) => `${job.step} of ${job.total}`,
    "time left": (job) => duration(job.eta_s),
  },
  workers: {
    " name": (worker) => worker.name,
    " device": (worker) => worker.device,
    "megapixel-steps per s": (worker) => worker.megapixel_steps_per_s?.toFixed(2) ?? "–",
    "running for": (worker) => duration(worker.age_s),
    " takes jobs": (worker) => (worker.drained ? "no, drained" : "yes"),
  },
  quarantined: {
    " SHA-256": (entry) => entry.digest,
    " until": (entry) => new Date(entry.until).toLocaleString(),
  },
};

function row(kind, headings, texts) {
  const line = document.createElement("tr");
  headings.forEach((heading, i) => {
    const cell = document.createElement(kind);
    if (kind === "th") cell.scope = "col";
    if (heading.startsWith(" ")) cell.className = "text";
    cell.textContent = texts[i];
    line.append(cell);
  });
  return line;
}

function show(name, entries) {
  const headings = Object.keys(COLUMNS[name]);
  const body = document.createElement("tbody");
  body.append(...entries.map((entry) =>
    row("td", headings, Object.values(COLUMNS[name]).map((text) => text(entry)))));
  const head = document.createElement("thead");
  head.append(row("th", headings, headings.map((heading) => heading.trim())));
  $(name).replaceChildren(...(entries.length ? [head, body] : [none()]));
}

function none() {
  const caption = document.createElement("caption");
  caption.className = "none";
  caption.textContent = "none";
  return caption;
}

async function refresh() {
  try {
    const queue = await json("v1/queue");
    for (const name of Object.keys(COLUMNS)) show(name, queue[name]);
    const waiting = `${queue.interactive} interactive and ${queue.batch} batch jobs wait`;
    $("summary").textContent = `${waiting}, ${queue.running.length} run.`;
    $("problem").hidden = true;
    $("queue").hidden = false;
  } catch (e) {
    if (!(e instanceof Problem)) throw e;
    $("problem").querySelector("p").textContent = e.message || e.title;
    $("key").hidden = ![401, 403].includes(e.status);
    $("problem").hidden = false;
    $("queue").hidden ||= !$("key").hidden;
    if (!$("key").hidden) return; // until another key is entered
  }
  setTimeout(refresh, POLL_MS);
}

$("key").onsubmit = (e) => {
  e.preventDefault();
  useKey($("key").elements.key.value.trim());
  refresh();
};
refresh();
