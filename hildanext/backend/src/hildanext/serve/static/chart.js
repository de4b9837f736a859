/** A loss curve as SVG, drawn at the width it has, so that its words stay readable on a phone. */

const NS = "http://www.w3.org/2000/svg";
const HEIGHT = 220;
const PAD = { left: 46, right: 12, top: 10, bottom: 34 };

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
    this.train = [];
    this.held = [];
    this.figure = document.createElement("figure");
    this.figure.className = "chart";
    this.svg = node("svg", { role: "img", height: HEIGHT });
    this.caption = document.createElement("figcaption");
    this.figure.append(this.caption, this.svg);
    this.sized = new ResizeObserver(() => this.drawSoon());
    this.sized.observe(this.figure);
  }

  /** @param {{kind: string, step: number, tokens: number, loss: ?number, bound: ?number}} metric */
  add(metric) {
    const x = metric.tokens ?? metric.step;
    if (metric.kind === "train" && Number.isFinite(metric.loss)) this.train.push([x, metric.loss]);
    else if (metric.kind === "eval" && Number.isFinite(metric.bound)) this.held.push([x, metric.bound]);
    else return;
    this.drawSoon();
  }

  drawSoon() {
    this.asked ??= requestAnimationFrame(() => { this.asked = undefined; this.draw(); });
  }

  /** The curve in one sentence. */
  words() {
    const [first, last] = [this.train.at(0), this.train.at(-1)];
    const loss = last ? `loss ${first[1].toFixed(2)} at first, ${last[1].toFixed(2)} at ${short(last[0])} tokens` : "no loss yet";
    const bound = this.held.length ? `; held out ${this.held.at(0)[1].toFixed(2)} at first, ${this.held.at(-1)[1].toFixed(2)} now` : "";
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
    for (const value of ticks(span.y0, span.y1, 4)) {
      this.svg.append(node("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value) }));
      this.svg.append(node("text", { x: PAD.left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const value of ticks(span.x0, span.x1, Math.max(2, width / 130))) {
      this.svg.append(node("text", { x: x(value), y: HEIGHT - 16, "text-anchor": "middle" }, short(value)));
    }
    this.svg.append(node("text", { x: width - PAD.right, y: HEIGHT - 2, "text-anchor": "end" }, "tokens"));
    this.svg.append(node("line", { class: "key train", x1: PAD.left, x2: PAD.left + 18, y1: HEIGHT - 6, y2: HEIGHT - 6 }));
    this.svg.append(node("text", { x: PAD.left + 24, y: HEIGHT - 2 }, "training"));
    this.svg.append(node("rect", { class: "held-point", x: PAD.left + 86, y: HEIGHT - 9, width: 6, height: 6 }));
    this.svg.append(node("text", { x: PAD.left + 98, y: HEIGHT - 2 }, "held-out bound"));
  }

  close() {
    this.sized.disconnect();
  }
}
