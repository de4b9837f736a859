/** A curve of the loss, or of the reward, as SVG, drawn at the width it has, so that its words stay readable on a phone. */

const NS = "http://www.w3.org/2000/svg";
const HEIGHT = 220;
const PAD = { left: 46, right: 12, top: 22, bottom: 38 };
const LEGEND = HEIGHT - 5;  // the line on which its words stand

function node(name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Round values between two bounds, about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((by) => by * power).find((size) => size >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(10)));
  return found;
}

function short(value) {
  if (Math.abs(value) >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (Math.abs(value) >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return String(value);
}

export class LossChart {
  /** @param {string} stage  which stage's losses these are */
  constructor(stage) {
    this.stage = stage;
    /** An alignment has a reward and held-out accuracy by its steps, all else a loss and a bound by tokens. */
    this.aligned = false;
    this.train = [];
    this.held = [];
    /** Where the size of the blocks changed: losses before and after are not of the same task. */
    this.blocks = [];
    this.figure = document.createElement("figure");
    this.figure.className = "chart";
    this.svg = node("svg", { role: "img", height: HEIGHT });
    this.caption = document.createElement("figcaption");
    this.figure.append(this.caption, this.svg);
    this.sized = new ResizeObserver(() => this.drawSoon());
    this.sized.observe(this.figure);
  }

  /**
   * @param {{kind: string, step: number, tokens: number, loss: ?number, bound: ?number, block_size: ?number,
   *   reward: ?number, accuracy: ?number}} metric
   */
  add(metric) {
    const x = this.aligned ? metric.step : metric.tokens ?? metric.step;
    if (Number.isFinite(metric.reward)) {
      this.aligned = true;
      if (metric.kind === "train") this.train.push([metric.step, metric.reward]);
      else if (Number.isFinite(metric.accuracy)) this.held.push([metric.step, metric.accuracy]);
    } else if (metric.kind === "train" && Number.isFinite(metric.loss)) {
      this.train.push([x, metric.loss]);
      const size = metric.block_size;
      if (size !== undefined && size !== this.blocks.at(-1)?.[1]) this.blocks.push([x, size]);
    } else if (metric.kind === "eval" && Number.isFinite(metric.bound)) this.held.push([x, metric.bound]);
    else return;
    this.drawSoon();
  }

  drawSoon() {
    this.asked ??= requestAnimationFrame(() => { this.asked = undefined; this.draw(); });
  }

  /** The curve in one sentence. */
  words() {
    const last = this.train.at(-1);
    if (this.aligned) {
      const reward = last ? `reward ${last[1].toFixed(2)} after ${last[0]} steps` : "no reward yet";
      const [start, end] = [this.held.at(0), this.held.at(-1)];
      const right = end ? `; held-out accuracy ${end[1].toFixed(2)}${end === start ? "" : `, at first ${start[1].toFixed(2)}`}` : "";
      return `${this.stage}: ${reward}${right}`;
    }
    const size = this.blocks.at(-1)?.[1];
    const block = size === undefined ? "" : ` on blocks of ${size}`;
    const loss = last ? `loss ${last[1].toFixed(2)} after ${short(last[0])} tokens${block}` : "no loss yet";
    const [first, now] = [this.held.at(0), this.held.at(-1)];
    const bound = now ? `; held-out bound ${now[1].toFixed(2)}${now === first ? "" : `, at first ${first[1].toFixed(2)}`}` : "";
    return `${this.stage}: ${loss}${bound} (nats per token)`;
  }

  draw() {
    const width = Math.max(this.figure.clientWidth, 240);
    const all = [...this.train, ...this.held];
    this.caption.textContent = this.words();
    this.svg.replaceChildren();
    this.svg.setAttribute("aria-label", this.words());
    this.svg.setAttribute("width", width);
    if (all.length === 0) return;
    const xs = all.map(([x]) => x), ys = all.map(([, y]) => y);
    const span = { x0: Math.min(...xs), x1: Math.max(...xs), y0: Math.min(...ys), y1: Math.max(...ys) };
    const rise = span.y1 - span.y0 || 1;
    span.y0 -= 0.06 * rise;
    span.y1 += 0.06 * rise;
    const x = (value) => PAD.left + (value - span.x0) / (span.x1 - span.x0 || 1) * (width - PAD.left - PAD.right);
    const y = (value) => PAD.top + (span.y1 - value) / (span.y1 - span.y0) * (HEIGHT - PAD.top - PAD.bottom);
    this.drawAxes(x, y, span, width);
    const line = (points) => points.map(([at, value]) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    this.svg.append(node("polyline", { class: "train", points: line(this.train) }));
    this.svg.append(node("polyline", { class: "held", points: line(this.held) }));
    for (const [at, value] of this.held) {
      this.svg.append(node("rect", { class: "held-point", x: x(at) - 3, y: y(value) - 3, width: 6, height: 6 }));
    }
  }

  drawAxes(x, y, span, width) {
    this.drawBlocks(x);
    for (const value of ticks(span.y0, span.y1, 4)) {
      this.svg.append(node("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value) }));
      this.svg.append(node("text", { x: PAD.left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const value of ticks(span.x0, span.x1, Math.max(3, width / 130))) {
      this.svg.append(node("text", { x: x(value), y: HEIGHT - 22, "text-anchor": "middle" }, short(value)));
    }
    this.svg.append(node("text", { x: width - PAD.right, y: LEGEND, "text-anchor": "end" }, this.aligned ? "steps" : "tokens"));
    this.svg.append(node("line", { class: "key train", x1: PAD.left, x2: PAD.left + 18, y1: LEGEND - 4, y2: LEGEND - 4 }));
    this.svg.append(node("text", { x: PAD.left + 24, y: LEGEND }, this.aligned ? "reward" : "training"));
    this.svg.append(node("rect", { class: "held-point", x: PAD.left + 86, y: LEGEND - 7, width: 6, height: 6 }));
    this.svg.append(node("text", { x: PAD.left + 98, y: LEGEND }, this.aligned ? "held-out accuracy" : "held-out bound"));
  }

  /** A line where the size of the blocks changed; its name where there is room. */
  drawBlocks(x) {
    let room = 0;
    for (const [at, size] of this.blocks) {
      const place = x(at);
      if (at !== this.blocks[0][0]) {
        this.svg.append(node("line", { class: "turn", x1: place, x2: place, y1: PAD.top - 16, y2: HEIGHT - PAD.bottom }));
      }
      if (place < room) continue;
      this.svg.append(node("text", { x: place + 4, y: PAD.top - 8 }, `block ${size}`));
      room = place + 60;
    }
  }

  close() {
    this.sized.disconnect();
  }
}
