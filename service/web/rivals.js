// A worker: what the browser's own encoder makes of a picture in so many bytes, by bisection.

const TRIES = 7;

onmessage = async ({ data: { bitmap, bytes, types } }) => {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  for (const type of types) {
    const made = await largest(canvas, type, bytes).catch(() => ({ file: null })); // too wide
    postMessage({ type, ...made });
  }
};

// The file of the highest quality within `bytes`; the smallest one where none is.
async function largest(canvas, type, bytes) {
  let [low, high] = [0, 1];
  let best = { file: await canvas.convertToBlob({ type, quality: 0 }), quality: 0 };
  if (best.file.type !== type) return { file: null, quality: 0 };
  for (let i = 0; i < TRIES && best.file.size <= bytes; i += 1) {
    const quality = (low + high) / 2;
    const file = await canvas.convertToBlob({ type, quality });
    if (file.size <= bytes) {
      low = quality;
      best = { file, quality };
    } else {
      high = quality;
    }
  }
  return best;
}
