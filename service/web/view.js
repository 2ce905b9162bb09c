// Canvas with two pictures, one on each side of a divider.
//
// Zoom and pan render each picture to a layer; other changes combine layers.

const DOUBLINGS = 2; // differences × 4
const PIXELATED = 3; // scale without smoothing
const MAX_SCALE = 32;
const FADE_MS = 300;
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

const newCanvas = (width, height) =>
  Object.assign(document.createElement("canvas"), { width, height });

class Picture {
  constructor(bitmap) {
    this.levels = [bitmap]; // each half as large as the one before
  }

  level(scale) {
    const { width, height } = this.levels[0];
    let i = 0;
    while (scale <= 0.5 ** (i + 1) && Math.min(width, height) >> i > 1) i += 1;
    while (this.levels.length <= i) {
      const finer = this.levels.at(-1);
      const half = newCanvas(Math.max(finer.width >> 1, 1), Math.max(finer.height >> 1, 1));
      half.getContext("2d").drawImage(finer, 0, 0, half.width, half.height);
      this.levels.push(half);
    }
    return this.levels[i];
  }

  // A canvas with the picture as the view shows it; cached.
  render({ canvas, scale, x, y, width, height }) {
    const { width: w, height: h } = canvas;
    const background = getComputedStyle(canvas).backgroundColor;
    const key = [w, h, scale, x, y, background].join();
    if (this.cached?.key !== key) {
      const layer = this.cached?.layer ?? newCanvas(w, h);
      if (layer.width !== w || layer.height !== h) Object.assign(layer, { width: w, height: h });
      const context = layer.getContext("2d");
      context.fillStyle = background;
      context.fillRect(0, 0, w, h);
      context.imageSmoothingEnabled = scale < PIXELATED;
      const level = this.level((scale * width) / this.levels[0].width);
      context.drawImage(level, x, y, width * scale, height * scale);
      this.cached = { key, layer };
    }
    return this.cached.layer;
  }

  close() {
    this.levels[0].close?.();
  }
}

export class View extends EventTarget {
  pictures = new Map();
  left = "";
  right = "";
  realism = 1;
  split = 0.5;
  difference = false;
  width = 0; // picture pixels
  height = 0;
  scale = 1; // screen pixels per picture pixel
  x = 0; // top left, in screen pixels
  y = 0;
  fitted = true;
  #frame = 0;
  #only = "";
  #fade = { name: "", from: null, start: 0 };
  #pointers = new Map();

  constructor(canvas) {
    super();
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    const observer = new ResizeObserver((entries) => this.#resize(entries.at(-1)));
    try {
      observer.observe(canvas, { box: "device-pixel-content-box" });
    } catch {
      observer.observe(canvas); // Safari
    }
    this.#listen();
  }

  // Set a picture; `fade` it in over the former or the instant one.
  put(name, bitmap, fade = false) {
    const before = this.pictures.get(name);
    const from = before ?? this.pictures.get("instant");
    this.pictures.set(name, new Picture(bitmap));
    this.#endFade();
    if (fade && from && !reducedMotion.matches) this.#fade = { name, from, start: performance.now() };
    else before?.close();
    this.draw();
  }

  drop(name) {
    this.#endFade();
    this.pictures.get(name)?.close();
    this.pictures.delete(name);
    this.draw();
  }

  // Remove all pictures; the next ones have this size.
  clear(width, height) {
    this.#endFade();
    for (const picture of this.pictures.values()) picture.close();
    this.pictures.clear();
    Object.assign(this, { width, height });
    this.fit();
    this.draw();
  }

  // Draw in the next frame; with `name`, only that picture.
  draw(name = "") {
    this.#only = this.#frame && this.#only !== name ? "" : name;
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#compose(this.#only);
      this.dispatchEvent(new Event("paint"));
    });
  }

  // The scale at which the picture fits the canvas, `largest` at most.
  #fitScale(largest = 2 * devicePixelRatio) {
    const { canvas, width, height } = this;
    return Math.min(canvas.width / width, canvas.height / height, largest);
  }

  fit() {
    if (!this.width) return;
    this.scale = this.#fitScale();
    this.#move();
  }

  get fullyVisible() {
    const { canvas, width, height, scale } = this;
    return width * scale < canvas.width + 1 && height * scale < canvas.height + 1;
  }

  // Zoom; the point (x, y) of the screen stays where it is.
  zoom(scale, x = this.canvas.width / 2, y = this.canvas.height / 2) {
    const to = Math.min(Math.max(scale, this.#fitScale(1)), MAX_SCALE);
    this.x = x - ((x - this.x) * to) / this.scale;
    this.y = y - ((y - this.y) * to) / this.scale;
    this.scale = to;
    this.#move();
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.#move();
  }

  // Keep the picture within the canvas, centred if it is smaller; draw it.
  #move() {
    const clamp = (at, size, room) =>
      size <= room ? (room - size) / 2 : Math.min(Math.max(at, room - size), 0);
    this.fitted = this.scale === this.#fitScale();
    this.x = Math.round(clamp(this.x, this.width * this.scale, this.canvas.width));
    this.y = Math.round(clamp(this.y, this.height * this.scale, this.canvas.height));
    this.dispatchEvent(new Event("moved"));
    this.draw();
  }

  #resize({ contentRect, devicePixelContentBoxSize: [exact] = [] }) {
    const { canvas } = this;
    const sides = exact
      ? [exact.inlineSize, exact.blockSize]
      : [contentRect.width, contentRect.height].map((side) => Math.round(side * devicePixelRatio));
    const [width, height] = sides.map((side) => Math.max(side, 1));
    if (width === canvas.width && height === canvas.height) return;
    Object.assign(canvas, { width, height });
    if (this.fitted) this.fit();
    else this.#move();
    this.#compose(); // now: resizing has cleared the canvas
  }

  #compose(only = "") {
    const { context: c, canvas: { width, height } } = this;
    c.globalCompositeOperation = "source-over";
    if (!this.pictures.size) {
      c.fillStyle = getComputedStyle(this.canvas).backgroundColor;
      c.fillRect(0, 0, width, height);
    } else if (this.difference) {
      const right = newCanvas(width, height);
      this.#paint(right.getContext("2d"), this.right, 0, width);
      this.#paint(c, this.left, 0, width);
      c.globalCompositeOperation = "difference";
      c.drawImage(right, 0, 0);
      c.globalCompositeOperation = "lighter";
      for (let i = 0; i < DOUBLINGS; i += 1) c.drawImage(this.canvas, 0, 0);
    } else {
      const at = Math.round(this.split * width);
      const [first, last] = only ? this.#columns() : [0, width];
      if (!only || only === this.left) this.#paint(c, this.left, first, Math.min(at, last));
      if (!only || only === this.right) this.#paint(c, this.right, Math.max(at, first), last);
    }
  }

  // The columns of the canvas that the picture covers.
  #columns() {
    const end = Math.ceil(this.x + this.width * this.scale);
    return [Math.max(this.x, 0), Math.min(end, this.canvas.width)];
  }

  // Paint a picture between two columns; realism mixes in the instant one.
  #paint(c, name, from, to) {
    const width = to - from;
    const { height } = this.canvas;
    const instant = this.pictures.get("instant");
    const main = this.pictures.get(name) ?? instant;
    if (!main || width <= 0) return;
    const layers = [[main, 1]];
    if (this.#fade.name === name) {
      const alpha = (performance.now() - this.#fade.start) / FADE_MS;
      if (alpha < 1) layers.splice(0, 1, [this.#fade.from, 1], [main, alpha]);
      else this.#endFade();
      this.draw();
    }
    if (name === "drawn" && instant && this.realism < 1) layers.push([instant, 1 - this.realism]);
    for (const [picture, alpha] of layers) {
      c.globalAlpha = alpha;
      c.drawImage(picture.render(this), from, 0, width, height, from, 0, width, height);
    }
    c.globalAlpha = 1;
  }

  #endFade() {
    const { from } = this.#fade;
    if (from && from !== this.pictures.get("instant")) from.close();
    this.#fade = { name: "", from: null, start: 0 };
  }

  #listen() {
    const { canvas } = this;
    const position = (e) => {
      const box = canvas.getBoundingClientRect();
      const ratio = canvas.width / box.width;
      return [(e.clientX - box.left) * ratio, (e.clientY - box.top) * ratio];
    };
    const pinch = () => {
      const [[ax, ay], [bx, by]] = this.#pointers.values();
      return [Math.hypot(ax - bx, ay - by), (ax + bx) / 2, (ay + by) / 2];
    };
    const stage = canvas.parentElement; // includes the divider, which covers the canvas
    stage.addEventListener("wheel", (e) => {
      if (!this.width) return;
      e.preventDefault();
      this.zoom(this.scale * 2 ** (-e.deltaY / (e.deltaMode ? 6 : 200)), ...position(e));
    }, { passive: false });
    stage.addEventListener("dblclick", (e) => {
      if (!this.width || e.target.closest("button")) return;
      if (this.fitted) this.zoom(devicePixelRatio, ...position(e));
      else this.fit();
    });
    canvas.addEventListener("pointerdown", (e) => {
      if (e.button) return;
      canvas.setPointerCapture(e.pointerId);
      this.#pointers.set(e.pointerId, position(e));
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, (e) => this.#pointers.delete(e.pointerId));
    }
    canvas.addEventListener("pointermove", (e) => {
      const before = this.#pointers.get(e.pointerId);
      if (!before || !this.width || !e.buttons) return;
      const two = this.#pointers.size === 2;
      const [distance, cx, cy] = two ? pinch() : [0, 0, 0];
      const now = position(e);
      this.#pointers.set(e.pointerId, now);
      if (two) {
        const [newDistance, x, y] = pinch();
        this.pan(x - cx, y - cy);
        this.zoom((this.scale * newDistance) / distance, x, y);
      } else if (this.fullyVisible) {
        this.dispatchEvent(new CustomEvent("slide", { detail: now[0] / canvas.width }));
      } else {
        this.pan(now[0] - before[0], now[1] - before[1]);
      }
    });
    canvas.addEventListener("keydown", (e) => {
      const step = 64 * devicePixelRatio;
      const by = {
        ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step],
      }[e.key];
      if (!by || !this.width || this.fullyVisible || e.ctrlKey || e.metaKey) return;
      e.preventDefault();
      this.pan(...by);
    });
  }
}
