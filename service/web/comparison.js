// The pictures: which two are compared, their labels, and their sizes.

import { $, fields, showStage } from "./panel.js";
import { View } from "./view.js";

export const view = new View($("canvas"));

const LABELS = {
  original: "Original", jpeg: "JPEG", webp: "WebP", instant: "Instant", drawn: "Diffusion",
};
const preferred = { left: "instant", right: "drawn" }; // selected as soon as they exist
const expected = new Set(); // pictures that exist or are being made
const rows = new Map(); // of the table
let tier = "";
let encoder = null;

export function reset() {
  encoder?.terminate();
  encoder = null;
  expected.clear();
  rows.clear();
  tier = "";
  $("rows").replaceChildren();
  view.clear(0, 0);
}

export function setSize(width, height) {
  view.clear(width, height);
  $("size").textContent = `${width} × ${height}`;
}

export function put(name, bitmap, fade) {
  view.put(name, bitmap, fade);
  showStage(true);
  if (document.activeElement === document.body) $("canvas").focus({ preventScroll: true });
}

// Set the tier of the diffusion picture, and whether there will be one.
export function setDiffusion(name, exists) {
  tier = name;
  if (exists) expected.add("drawn");
  else expected.delete("drawn");
}

export function refresh() {
  const names = Object.keys(LABELS).filter((n) => view.pictures.has(n) || expected.has(n));
  for (const [side, name] of Object.entries(preferred)) {
    fields[side].replaceChildren(...names.map((n) => new Option(label(n), n)));
    fields[side].value = [name, "instant", ...names].find((n) => names.includes(n));
  }
  $("compare").hidden = names.length < 2;
  updateLabels();
  view.draw();
}

export function select(side, name) {
  preferred[side] = name;
  updateLabels();
  view.draw();
}

export function setRealism(realism) {
  view.realism = realism;
  if (view.width) updateLabels();
  view.draw("drawn");
}

export function toggleDifference() {
  view.difference = !view.difference;
  $("stage").classList.toggle("difference", view.difference);
  updateLabels();
  view.draw();
}

function label(name) {
  if (name !== "drawn") return LABELS[name];
  return tier === "perceptual" ? "Perceptual" : tier.toUpperCase() || LABELS.drawn;
}

function updateLabels() {
  const [left, right] = ["left", "right"].map((side) => {
    const name = fields[side].value;
    const mixed = name === "drawn" && view.realism < 1;
    const suffix = view.pictures.has(name) ? "" : " …";
    view[side] = name;
    return ($(side).textContent =
      label(name) + (mixed ? ` at ${Math.round(view.realism * 100)} %` : suffix));
  });
  $("canvas").setAttribute("aria-label", view.difference
    ? `Difference between ${left} and ${right}, amplified four times`
    : `${left} on the left of the divider, ${right} on the right`);
}

// Set a picture's row; `bytes`: null while it is made, NaN if that is impossible.
export function setRow(name, bytes, remark = "") {
  const text = (name === "instant" ? "Bitstream" : LABELS[name]) + (remark && `, ${remark}`);
  const bpp = (8 * bytes) / (view.width * view.height);
  const cells = bytes ? [bytes.toLocaleString("en"), bpp.toFixed(3)] : [bytes === null ? "…" : "–", ""];
  const row = document.createElement("tr");
  row.append(...[text, ...cells].map((cell, i) =>
    Object.assign(document.createElement(i ? "td" : "th"), { textContent: cell })));
  rows.set(name, row);
  $("rows").replaceChildren(...Object.keys(LABELS).flatMap((n) => rows.get(n) ?? []));
  $("numbers").hidden = false;
}

// Encode the original as JPEG and WebP of the bitstream's size.
export function compareFormats(original, bytes) {
  encoder?.terminate();
  for (const name of ["jpeg", "webp"]) {
    view.drop(name);
    expected.add(name);
    setRow(name, null);
  }
  refresh();
  const worker = new Worker(new URL("rivals.js", import.meta.url));
  encoder = worker;
  worker.onmessage = async ({ data: { type, file, quality } }) => {
    const name = type.split("/")[1];
    const bitmap = file && await createImageBitmap(file).catch(() => null);
    if (worker !== encoder) return void bitmap?.close();
    if (bitmap) {
      const smallest = file.size > bytes;
      put(name, bitmap);
      setRow(name, file.size, smallest ? "lowest quality" : `quality ${Math.round(100 * quality)}`);
    } else {
      expected.delete(name);
      setRow(name, NaN, "not supported by this browser");
    }
    refresh();
  };
  createImageBitmap(original).then((bitmap) => {
    worker.postMessage({ bitmap, bytes, types: ["image/jpeg", "image/webp"] }, [bitmap]);
  }, () => {}); // the original was closed
}
