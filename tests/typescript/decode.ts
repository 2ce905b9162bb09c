import { readFile, writeFile } from "node:fs/promises";
import createClient from "openapi-fetch";
import type { paths } from "./afterimage.js";

const [url = "http://127.0.0.1:8000", photo = "photo.png", output = "out.webp"] = process.argv.slice(2);
const api = createClient<paths>({
  baseUrl: url,
  bodySerializer: (body) => body, // bodies are bytes, not JSON
  headers: { "Content-Type": "application/octet-stream" },
});

const encoded = await api.POST("/v1/encodes", {
  params: { query: { quality: 2 } },
  body: new Blob([await readFile(photo)]),
  parseAs: "blob",
});
if (encoded.error) throw new Error(encoded.error.detail);

const seed = "9007199254740993"; // a number would be rounded to …992
const accepted = await api.POST("/v1/decodes", {
  params: { query: { tier: "perceptual", seed }, header: { prefer: "respond-async" } },
  body: encoded.data,
  headers: { Accept: "application/json" },
});
if (accepted.error) throw new Error(accepted.error.detail);

const id = accepted.response.headers.get("location")!.split("/").pop()!;
for (let status = ""; status !== "succeeded"; ) {
  const request = { params: { path: { id }, header: { prefer: "wait=1" } } };
  const { data: decode, error } = await api.GET("/v1/decodes/{id}", request);
  if (error) throw new Error(error.detail);
  if (decode.error) throw new Error(decode.error);
  console.log(decode.status, decode.step, "of", decode.total, "seed", decode.seed_text);
  status = decode.status;
}

const picture = await api.GET("/v1/decodes/{id}/image", {
  params: { path: { id } },
  headers: { Accept: "image/webp" },
  parseAs: "arrayBuffer",
});
if (picture.error) throw new Error(picture.error.detail);
await writeFile(output, new Uint8Array(picture.data));
