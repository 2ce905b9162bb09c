// Starts the page and watches the service's health.

import { json } from "./api.js";
import { connect } from "./controls.js";
import * as link from "./link.js";
import { $, loadTiers, showOperators } from "./panel.js";
import { attempt, openLink, resume } from "./session.js";

const HEALTH_MS = 5000;

async function checkHealth() {
  const health = await json("readyz").catch(() => null);
  if (!health) return;
  const down = health.redis === "down";
  $("away").hidden = !down;
  await loadTiers().catch(() => null);
  if (!down) resume();
}

function followLink() {
  const decode = link.read();
  if (decode) openLink(...decode);
}

connect();
addEventListener("hashchange", followLink);
await attempt(loadTiers);
checkHealth();
showOperators();
setInterval(checkHealth, HEALTH_MS);
followLink();
