// Drops and pastes that hold addresses or several files.

// The picture at the first address of a text/uri-list. A page may read data: and its own origin.
export async function fetchFirst(addresses) {
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

// What to show when several files are dropped.
export const onlyFirst = (files) =>
  refusal(`Opened the first of ${files.length} files`, `It is ${files[0].name}. Drop one at a time.`);

const refusal = (title, message) => Object.assign(new Error(message), { title });
