// Web worker: bisects for the best JPEG and WebP file of at most `bytes` bytes.

const TRIES = 7;

onmessage = async ({ data: { bitmap, bytes, types } }) => {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  for (const type of types) {
    const result = await best(canvas, type, bytes).catch(() => ({ file: null })); // size not supported
    postMessage({ type, ...result });
  }
};

// The best file within `bytes`, else the smallest.
async function best(canvas, type, bytes) {
  let [low, high] = [0, 1];
  let result = { file: await canvas.convertToBlob({ type, quality: 0 }), quality: 0 };
  if (result.file.type !== type) return { file: null }; // the browser has no such encoder
  for (let i = 0; i < TRIES && result.file.size <= bytes; i += 1) {
    const quality = (low + high) / 2;
    const file = await canvas.convertToBlob({ type, quality });
    if (file.size <= bytes) {
      low = quality;
      result = { file, quality };
    } else {
      high = quality;
    }
  }
  return result;
}
