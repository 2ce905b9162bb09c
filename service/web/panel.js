// Settings, progress and problem banner.

import * as api from "./api.js";

export const $ = (id) => document.getElementById(id);
export const fields = $("settings").elements; // by name or id

let tiers = [];
let retry = null; // the action that failed
let pending = 0;

/* Settings */

export const showOperators = () =>
  api.json("v1/queue").then(() => ($("operators").hidden = false), () => null);

export async function loadTiers() {
  if (tiers.length) return;
  const loaded = await api.json("v1/tiers");
  if (tiers.length) return; // by a concurrent call
  tiers = loaded;
  fields.tier.replaceChildren(...tiers.map((t) => new Option(t.name, t.name)));
  fields.tier.value = "perceptual";
  describeTier();
}

export function describeTier() {
  $("about").textContent = tiers.find((t) => t.name === fields.tier.value)?.description ?? "";
}

export function enableSettings(enabled) {
  for (const name of ["tier", "seed", "again"]) fields[name].disabled = !enabled;
}

export function showFile(name) {
  for (const id of ["qualities", "numbers", "compare", "link"]) $(id).hidden = true;
  $("source").hidden = false;
  $("welcome").hidden = true;
  $("file").textContent = name;
  for (const id of ["size", "times"]) $(id).textContent = "";
}

export function showStage(hasPictures) {
  $("stage").classList.toggle("full", hasPictures);
  $("welcome").hidden = hasPictures;
  $("source").hidden = !hasPictures;
}

// Hide an element; its focus moves to the canvas or the file button.
export function hide(id) {
  const heir = $("stage").matches(".full") ? "canvas" : "pick";
  if ($(id).contains(document.activeElement)) $(heir).focus({ preventScroll: true });
  $(id).hidden = true;
}

/* Progress */

export function showProgress(fraction) {
  $("ring").hidden = false;
  $("arc").style.strokeDashoffset = 100 - 100 * fraction;
  $("progress").setAttribute("aria-valuenow", Math.round(100 * fraction));
}

// `live`: whether screen readers announce the text.
export function showStatus(text, live = true) {
  $("ring").hidden = false;
  $("stand").ariaLive = live ? "polite" : "off";
  $("stand").textContent = text;
}

export function hideProgress() {
  showProgress(0);
  hide("ring");
  hide("cancel");
}

export function setBusy(busy) {
  pending += busy ? 1 : -1;
  $("canvas").ariaBusy = pending > 0;
}

/* Problems */

const PERMANENT = [400, 401, 403, 413, 415, 422]; // a retry would fail, too

export function showProblem({ title = "Something went wrong", message, status }, action) {
  $("problem").hidden = false;
  const [heading, text] = $("problem").querySelectorAll("strong, span");
  heading.textContent = title;
  text.textContent = message;
  retry = action;
  $("key").hidden = ![401, 403].includes(status);
  $("retry").hidden = !action || PERMANENT.includes(status);
  if (!$("key").hidden) $("key").elements.key.focus();
}

export const hideProblem = () => hide("problem");
export const failedAction = () => retry;
