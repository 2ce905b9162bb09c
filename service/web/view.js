// Two pictures on one canvas, under one zoom, on either side of a divider.
//
// A picture is scaled to the view once, into a canvas as large as the view; what moves the divider,
// realism or the difference only lays those canvases over each other.

const GAIN = 2; // doublings of a difference
const SHARP = 3; // screen pixels a pixel, from which on pixels are squares
const LARGEST = 32;
const FADE_MS = 300;
const still = matchMedia("(prefers-reduced-motion: reduce)");

const scratch = (width, height) =>
  Object.assign(document.createElement("canvas"), { width, height });

class Picture {
  constructor(bitmap) {
    this.levels = [bitmap]; // each half the one before, for views that are smaller
    this.scaled = null;
  }

  get size() {
    return [this.levels[0].width, this.levels[0].height];
  }

  level(scale) {
    let at = 0;
    while (scale <= 0.5 ** (at + 1) && Math.min(...this.size) >> at > 1) at += 1;
    while (this.levels.length <= at) {
      const finer = this.levels.at(-1);
      const half = scratch(Math.max(finer.width >> 1, 1), Math.max(finer.height >> 1, 1));
      half.getContext("2d").drawImage(finer, 0, 0, half.width, half.height);
      this.levels.push(half);
    }
    return this.levels[at];
  }

  // The picture as the view shows it: drawn when the view has changed.
  shown({ canvas, scale, x, y, width, height }) {
    const { width: w, height: h } = canvas;
    const ground = getComputedStyle(canvas).backgroundColor;
    const now = [w, h, scale, x, y, ground].join();
    if (this.scaled?.now !== now) {
      const own = this.scaled?.own ?? scratch(w, h);
      if (own.width !== w || own.height !== h) Object.assign(own, { width: w, height: h });
      const context = own.getContext("2d");
      context.fillStyle = ground;
      context.fillRect(0, 0, w, h);
      context.imageSmoothingEnabled = scale < SHARP;
      context.drawImage(this.level((scale * width) / this.size[0]), x, y, width * scale, height * scale);
      this.scaled = { now, own };
    }
    return this.scaled.own;
  }

  close() {
    this.levels[0].close?.();
  }
}

export class View extends EventTarget {
  pictures = new Map(); // by name
  left = "";
  right = "";
  realism = 1;
  split = 0.5; // of the view's width
  difference = false;
  width = 0; // of a picture, in its pixels
  height = 0;
  scale = 1; // screen pixels a pixel
  x = 0; // where a picture begins, in screen pixels
  y = 0;
  fitted = true;
  #frame = 0;
  #only = "";
  #fade = { name: "", from: null, began: 0 };
  #pointers = new Map();

  constructor(canvas) {
    super();
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    const observer = new ResizeObserver((entries) => this.#resize(entries.at(-1)));
    try {
      observer.observe(canvas, { box: "device-pixel-content-box" }); // other screens, too
    } catch {
      observer.observe(canvas); // Safari
    }
    this.#listen();
  }

  // A picture under a name; the drawn one fades in over its predecessor, at first the instant one.
  put(name, bitmap, fade = false) {
    const before = this.pictures.get(name);
    const from = before ?? this.pictures.get("instant");
    this.pictures.set(name, new Picture(bitmap));
    this.#still();
    if (fade && from && !still.matches) this.#fade = { name, from, began: performance.now() };
    else before?.close();
    this.draw();
  }

  drop(name) {
    this.#still();
    this.pictures.get(name)?.close();
    this.pictures.delete(name);
    this.draw();
  }

  clear(width, height) {
    this.#still();
    for (const picture of this.pictures.values()) picture.close();
    this.pictures.clear();
    Object.assign(this, { width, height });
    this.fit();
    this.draw();
  }

  // Draw with the next frame: everything, or only where this picture is.
  draw(name = "") {
    this.#only = this.#frame && this.#only !== name ? "" : name;
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#compose(this.#only);
      this.dispatchEvent(new Event("drawn"));
    });
  }

  get #best() {
    const { canvas, width, height } = this;
    return Math.min(canvas.width / width, canvas.height / height, 2 * devicePixelRatio);
  }

  fit() {
    if (!this.width) return;
    this.scale = this.#best;
    this.#moved();
  }

  // Whether all of a picture is in view: there is nothing to pan.
  get whole() {
    const { canvas, width, height, scale } = this;
    return width * scale < canvas.width + 1 && height * scale < canvas.height + 1;
  }

  // Zoom so that what is at (x, y) on the screen stays there.
  zoom(scale, x = this.canvas.width / 2, y = this.canvas.height / 2) {
    const least = Math.min(this.canvas.width / this.width, this.canvas.height / this.height, 1);
    const to = Math.min(Math.max(scale, least), LARGEST);
    this.x = x - ((x - this.x) * to) / this.scale;
    this.y = y - ((y - this.y) * to) / this.scale;
    this.scale = to;
    this.#moved();
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.#moved();
  }

  #moved() {
    const bounds = (at, size, room) =>
      size <= room ? (room - size) / 2 : Math.min(Math.max(at, room - size), 0);
    this.fitted = this.scale === this.#best;
    this.x = Math.round(bounds(this.x, this.width * this.scale, this.canvas.width));
    this.y = Math.round(bounds(this.y, this.height * this.scale, this.canvas.height));
    this.dispatchEvent(new Event("moved"));
    this.draw();
  }

  #resize({ contentRect, devicePixelContentBoxSize: [exact] = [] }) {
    const { canvas } = this;
    const sides = exact
      ? [exact.inlineSize, exact.blockSize]
      : [contentRect.width, contentRect.height].map((side) => Math.round(side * devicePixelRatio));
    const to = sides.map((side) => Math.max(side, 1));
    if (to[0] === canvas.width && to[1] === canvas.height) return;
    [canvas.width, canvas.height] = to;
    if (this.fitted) this.fit();
    else this.#moved();
    this.#compose(); // at once: a canvas whose size was set is empty
  }

  #compose(only = "") {
    const { context: c, canvas: { width, height } } = this;
    c.globalCompositeOperation = "source-over";
    if (!this.pictures.size) {
      c.fillStyle = getComputedStyle(this.canvas).backgroundColor;
      c.fillRect(0, 0, width, height);
    } else if (this.difference) {
      const over = scratch(width, height);
      this.#lay(over.getContext("2d"), this.right, 0, width);
      this.#lay(c, this.left, 0, width);
      c.globalCompositeOperation = "difference";
      c.drawImage(over, 0, 0);
      c.globalCompositeOperation = "lighter";
      for (let i = 0; i < GAIN; i += 1) c.drawImage(this.canvas, 0, 0);
    } else {
      const at = Math.round(this.split * width);
      const [first, last] = only ? this.#across() : [0, width]; // what is beside it stays as it is
      if (!only || only === this.left) this.#lay(c, this.left, first, Math.min(at, last));
      if (!only || only === this.right) this.#lay(c, this.right, Math.max(at, first), last);
    }
  }

  // The columns of the view that pictures cover.
  #across() {
    const end = Math.ceil(this.x + this.width * this.scale);
    return [Math.max(this.x, 0), Math.min(end, this.canvas.width)];
  }

  // One side between two columns; the drawn picture is mixed with the instant one, by realism.
  #lay(c, name, from, to) {
    const width = to - from;
    const { height } = this.canvas;
    const own = this.pictures.get(name) ?? this.pictures.get("instant");
    if (!own || width <= 0) return;
    const layers = [[own, 1]];
    if (this.#fade.name === name) {
      const part = (performance.now() - this.#fade.began) / FADE_MS;
      if (part < 1) layers.splice(0, 1, [this.#fade.from, 1], [own, part]);
      else this.#still();
      this.draw();
    }
    const instant = this.pictures.get("instant");
    if (name === "drawn" && instant && this.realism < 1) layers.push([instant, 1 - this.realism]);
    for (const [picture, alpha] of layers) {
      c.globalAlpha = alpha;
      c.drawImage(picture.shown(this), from, 0, width, height, from, 0, width, height);
    }
    c.globalAlpha = 1;
  }

  // The fade is over.
  #still() {
    const { from } = this.#fade;
    if (from && from !== this.pictures.get("instant")) from.close();
    this.#fade = { name: "", from: null, began: 0 };
  }

  #listen() {
    const { canvas } = this;
    const at = (e) => {
      const box = canvas.getBoundingClientRect();
      const ratio = canvas.width / box.width;
      return [(e.clientX - box.left) * ratio, (e.clientY - box.top) * ratio];
    };
    const pinch = () => {
      const [[ax, ay], [bx, by]] = this.#pointers.values();
      return [Math.hypot(ax - bx, ay - by), (ax + bx) / 2, (ay + by) / 2];
    };
    const stage = canvas.parentElement; // the divider lies over the canvas
    stage.addEventListener("wheel", (e) => {
      if (!this.width) return;
      e.preventDefault();
      this.zoom(this.scale * 2 ** (-e.deltaY / (e.deltaMode ? 6 : 200)), ...at(e));
    }, { passive: false });
    stage.addEventListener("dblclick", (e) => {
      if (!this.width || e.target.closest("button")) return;
      if (this.fitted) this.zoom(devicePixelRatio, ...at(e));
      else this.fit();
    });
    canvas.addEventListener("pointerdown", (e) => {
      if (e.button) return;
      canvas.setPointerCapture(e.pointerId);
      this.#pointers.set(e.pointerId, at(e));
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, (e) => this.#pointers.delete(e.pointerId));
    }
    canvas.addEventListener("pointermove", (e) => {
      const before = this.#pointers.get(e.pointerId);
      if (!before || !this.width || !e.buttons) return;
      const two = this.#pointers.size === 2;
      const [apart, cx, cy] = two ? pinch() : [0, 0, 0];
      const now = at(e);
      this.#pointers.set(e.pointerId, now);
      if (two) {
        const [wide, x, y] = pinch();
        this.pan(x - cx, y - cy);
        this.zoom((this.scale * wide) / apart, x, y);
      } else if (this.whole) {
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
      if (!by || !this.width || this.whole || e.ctrlKey || e.metaKey) return;
      e.preventDefault();
      this.pan(...by);
    });
  }
}
