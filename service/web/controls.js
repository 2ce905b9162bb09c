// Listeners: files, settings, banner, and the view's buttons and keys.

import { useKey } from "./api.js";
import * as comparison from "./comparison.js";
import { view } from "./comparison.js";
import * as link from "./link.js";
import { $, describeTier, failedAction, fields, hideProblem, showOperators, showProblem } from "./panel.js";
import * as session from "./session.js";

const KEYS = { "+": "in", "=": "in", "-": "out", 0: "fit", 1: "one", d: "difference" };
const TOOLS = {
  in: () => view.zoom(view.scale * 1.5),
  out: () => view.zoom(view.scale / 1.5),
  fit: () => view.fit(),
  one: () => view.zoom(devicePixelRatio),
  difference: () => {
    comparison.toggleDifference();
    document.querySelector("[data-do=difference]").setAttribute("aria-pressed", view.difference);
  },
};

export function connect() {
  connectFiles();
  connectSettings();
  connectBanner();
  connectView();
}

function connectFiles() {
  const openFirst = ([file]) => file && session.openFile(file);
  $("pick").onclick = $("other").onclick = () => $("chosen").click();
  $("chosen").onchange = () => {
    const files = [...$("chosen").files];
    $("chosen").value = "";
    openFirst(files);
  };
  addEventListener("dragover", (e) => {
    e.preventDefault();
    $("stage").classList.toggle("over", e.dataTransfer.types.includes("Files"));
  });
  addEventListener("dragleave", () => $("stage").classList.remove("over"));
  addEventListener("drop", (e) => {
    e.preventDefault();
    $("stage").classList.remove("over");
    const { files } = e.dataTransfer; // cannot be read later
    const addresses = e.dataTransfer.getData("text/uri-list");
    import("./drop.js").then(({ open }) => open([...files], addresses)).catch(showProblem);
  });
  addEventListener("paste", (e) => openFirst(e.clipboardData.files));
  for (const button of document.querySelectorAll("[data-sample]")) {
    button.onclick = () => session.openSample(button.dataset.sample, button.firstElementChild.alt);
  }
}

function connectSettings() {
  const decodeAgain = () => {
    describeTier();
    session.changeSettings();
  };
  $("settings").onsubmit = (e) => e.preventDefault();
  for (const radio of fields.quality) radio.onchange = session.changeQuality;
  fields.tier.onchange = fields.seed.onchange = decodeAgain;
  $("again").onclick = () => {
    const { value } = fields.seed;
    const seed = BigInt(/^\d+$/.test(value) ? value : 0); // a Number has 53 bits only
    fields.seed.value = BigInt.asUintN(64, seed + 1n);
    decodeAgain();
  };
  fields.realism.oninput = () => {
    $("percent").textContent = `${fields.realism.value} %`;
    comparison.setRealism(fields.realism.value / 100);
  };
  for (const side of ["left", "right"]) {
    fields[side].onchange = () => comparison.select(side, fields[side].value);
  }
  $("link").onclick = () => link.copy().then(() => {
    $("link").textContent = "Copied";
    setTimeout(() => ($("link").textContent = "Copy link"), 2000);
  }, showProblem);
  $("cancel").onclick = () => session.cancel().catch((e) => {
    $("cancel").hidden = false;
    showProblem(e);
  });
}

function connectBanner() {
  const retry = () => failedAction() && session.attempt(failedAction());
  $("dismiss").onclick = hideProblem;
  $("retry").onclick = retry;
  $("key").onsubmit = (e) => {
    e.preventDefault();
    const key = $("key").elements.key.value.trim();
    if (/^[\x21-\x7e]+$/.test(key)) {
      useKey(key);
      showOperators();
      retry();
    } else {
      const message = "A key has only ASCII characters, and no spaces.";
      showProblem({ status: 401, title: "Invalid key", message }, failedAction());
    }
  };
}

function connectView() {
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
    $("canvas").classList.toggle("fitted", view.fullyVisible);
  });
  for (const button of document.querySelectorAll("[data-do]")) {
    button.onclick = () => view.width && TOOLS[button.dataset.do]();
  }
  $("canvas").addEventListener("keydown", (e) => {
    const tool = KEYS[e.key];
    if (!tool || !view.width || e.ctrlKey || e.metaKey) return;
    e.preventDefault();
    TOOLS[tool]();
  });
}
