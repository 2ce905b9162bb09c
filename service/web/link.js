// The page's address names the decode: #decode=<id>&bytes=<size>.

import { $ } from "./panel.js";

let current = "";
const copied = new Set();

export function write(id, bytes) {
  current = id;
  const hash = `#${new URLSearchParams({ decode: id, bytes })}`;
  history.replaceState(null, "", id ? hash : location.pathname);
  $("link").hidden = !id || !navigator.clipboard;
}

// The decode that the address names, unless it is on the page already.
export function read() {
  const query = new URLSearchParams(location.hash.slice(1));
  const id = query.get("decode");
  return id && id !== current ? [id, Number(query.get("bytes"))] : null;
}

export async function copy() {
  const id = current;
  await navigator.clipboard.writeText(location.href);
  copied.add(id);
}

// Decodes whose link was copied are not cancelled.
export const wasCopied = (id) => copied.has(id);
