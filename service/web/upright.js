// Turn a photo by its Exif orientation as the service does. Browsers differ: some turn WebP and
// PNG, some do not, and some know only one type of integer. So the browser gets no Exif data.

const TURNS = { // orientation -> matrix for a stored picture of w × h
  2: (w, h) => [-1, 0, 0, 1, w, 0],
  3: (w, h) => [-1, 0, 0, -1, w, h],
  4: (w, h) => [1, 0, 0, -1, 0, h],
  5: (w, h) => [0, 1, 1, 0, 0, 0],
  6: (w, h) => [0, 1, -1, 0, h, 0],
  7: (w, h) => [0, -1, -1, 0, h, w],
  8: (w, h) => [0, -1, 1, 0, 0, w],
};
const EXIF = "Exif\0\0";

// A bitmap of the photo, upright and on white, as the service encodes it.
export async function toPlain(photo) {
  const bitmap = await toUpright(photo);
  if (photo.type === "image/jpeg") return bitmap;
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.transferToImageBitmap();
}

// A bitmap of the photo, upright.
export async function toUpright(photo) {
  const bytes = new Uint8Array(await photo.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const found = findExif(bytes, view);
  const turn = found && TURNS[orientation(view, found.start, found.end)];
  if (!turn) return createImageBitmap(photo);
  bytes.fill(0x78, found.name, found.name + 4); // hide it from the browser
  const bitmap = await createImageBitmap(new Blob([bytes], { type: photo.type }));
  const { width, height } = bitmap;
  const matrix = turn(width, height);
  const canvas = matrix[0] ? new OffscreenCanvas(width, height) : new OffscreenCanvas(height, width);
  const context = canvas.getContext("2d");
  context.setTransform(...matrix);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.transferToImageBitmap();
}

const text = (bytes, at, size) => String.fromCharCode(...bytes.subarray(at, at + size));

// Where the Exif data of a JPEG, PNG or WebP file are: their name, first byte and end.
function findExif(bytes, view) {
  if (text(bytes, 0, 2) === "\xff\xd8") return inJpeg(bytes, view);
  if (text(bytes, 1, 3) === "PNG") return inChunks(bytes, view, 8, "eXIf", false);
  if (text(bytes, 8, 4) === "WEBP") return inChunks(bytes, view, 12, "EXIF", true);
  return null;
}

function inJpeg(bytes, view) {
  for (let at = 2; at + 10 < bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda;) {
    const end = at + 2 + view.getUint16(at + 2);
    if (bytes[at + 1] === 0xe1 && text(bytes, at + 4, 6) === EXIF) {
      return { name: at + 4, start: at + 10, end };
    }
    at = end;
  }
  return null;
}

// PNG: size, name, content, checksum. WebP: name, size, content, padded to an even size.
function inChunks(bytes, view, first, wanted, webp) {
  for (let at = first; at + 12 < bytes.length;) {
    const size = view.getUint32(webp ? at + 4 : at, webp);
    const name = webp ? at : at + 4;
    if (text(bytes, name, 4) === wanted) {
      const skip = text(bytes, at + 8, 6) === EXIF ? 6 : 0;
      return { name, start: at + 8 + skip, end: at + 8 + size };
    }
    at += webp ? 8 + size + (size & 1) : 12 + size;
  }
  return null;
}

function orientation(view, start, end) {
  const little = view.getUint8(start) === 0x49;
  try {
    const first = start + view.getUint32(start + 4, little);
    const count = view.getUint16(first, little);
    for (let at = first + 2; at < first + 2 + 12 * count && at + 12 <= end; at += 12) {
      if (view.getUint16(at, little) !== 0x0112) continue;
      const kind = view.getUint16(at + 2, little); // BYTE, SHORT or LONG
      if (kind === 1) return view.getUint8(at + 8);
      return kind === 4 ? view.getUint32(at + 8, little) : view.getUint16(at + 8, little);
    }
  } catch { /* broken Exif data are ignored */ }
  return 1;
}
