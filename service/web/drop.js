// What was dropped on the page: files, or the address of a picture of another page.

import { showProblem } from "./panel.js";
import { openFile } from "./session.js";

// Open the first file, otherwise the picture at the first address.
export async function open(files, addresses) {
  const file = files[0] ?? (await fetchFirst(addresses));
  openFile(file);
  if (files.length > 1) {
    const title = `Opened the first of ${files.length} files`;
    showProblem(refusal(title, `It is ${file.name}. Drop one file at a time.`));
  }
}

// The picture at the first address of a text/uri-list. A page may read data: and its own origin.
async function fetchFirst(addresses) {
  const address = addresses.split(/\r?\n/).find((line) => line && !line.startsWith("#"));
  if (!address) throw refusal("Nothing to open", "Drop a photograph or a bitstream.");
  const url = new URL(address, location.href);
  const embedded = url.protocol === "data:";
  if (!embedded && url.origin !== location.origin) {
    const message = `This page cannot read pictures of ${url.host || "other programs"}. ` +
      "Save the picture, then drop the file.";
    throw refusal("Only files can be dropped", message);
  }
  const response = await fetch(url).catch(() => null);
  if (!response?.ok) throw refusal("Cannot read the picture", "Save it, then drop the file.");
  const blob = await response.blob();
  const name = embedded ? "picture" : url.pathname.split("/").pop() || "picture";
  return new File([blob], name, { type: blob.type });
}

const refusal = (title, message) => Object.assign(new Error(message), { title });
