/** Draws the cells of a document; one token at a time can be looked at with pointer or keyboard. */

import { describe, SPECIAL } from "./recording.js";

/** A token's text as what is drawn: the space before it, its ink, and a line break behind it. */
function parts({ position, text, state }) {
  if (state === "mask") return { gap: " ", ink: "", tail: "" };
  // The beginning of text goes without saying; the end is worth seeing.
  if (SPECIAL.test(text)) return { gap: "", ink: position === 0 ? "" : "■", tail: "" };
  const gap = /^ +/.exec(text)?.[0] ?? "";
  const rest = text.slice(gap.length);
  if (rest.includes("\n")) {
    const at = rest.lastIndexOf("\n");
    const before = rest.slice(0, at).replaceAll("\n", "↵\n");
    return { gap, ink: state === "prompt" ? rest.slice(0, at) : `${before}↵`, tail: `\n${rest.slice(at + 1)}` };
  }
  return rest === "" ? { gap: "", ink: gap, tail: "" } : { gap, ink: rest.replaceAll("\uFFFD", "·"), tail: "" };
}

export class Canvas {
  /**
   * @param {HTMLElement} place  a focusable group
   * @param {HTMLElement} tip
   * @param {{readout: HTMLElement, onKey: (key: string) => boolean}} around
   */
  constructor(place, tip, { readout, onKey }) {
    this.place = place;
    this.tip = tip;
    this.readout = readout;
    this.onKey = onKey;
    this.spans = new Map();
    this.cells = [];
    this.active = null;
    place.addEventListener("keydown", (event) => this.keydown(event));
    place.addEventListener("pointerover", (event) => this.hover(event));
    place.addEventListener("pointerleave", () => this.hideTip());
    place.addEventListener("blur", () => this.activate(null));
    place.addEventListener("focus", () => { if (place.matches(":focus-visible")) this.move(0); });
  }

  clear(note = "") {
    this.spans.clear();
    this.cells = [];
    this.active = null;
    this.hideTip();
    this.place.replaceChildren();
    if (note) this.place.append(Object.assign(document.createElement("p"), { className: "blank", textContent: note }));
  }

  /** @param {import("./recording.js").Cell[]} cells  in the order of their positions */
  draw(cells) {
    if (this.spans.size === 0) this.place.replaceChildren();
    this.cells = cells;
    const present = new Set();
    let last = null;
    for (const one of cells) {
      present.add(one.position);
      const span = this.spans.get(one.position) ?? this.insert(one.position, last);
      this.paint(span, one);
      last = span;
    }
    for (const [position, span] of this.spans) {
      if (present.has(position)) continue;
      span.remove();
      this.spans.delete(position);
    }
    if (this.active !== null) this.activate(present.has(this.active) ? this.active : null);
  }

  /** Keep what was written last in view, where the text is longer than its sheet. */
  follow() {
    this.place.scrollTop = this.place.scrollHeight;
  }

  insert(position, before) {
    const span = document.createElement("span");
    span.dataset.position = String(position);
    if (before) before.after(span); else this.place.prepend(span);
    this.spans.set(position, span);
    return span;
  }

  paint(span, one) {
    const key = `${one.state} ${one.fresh} ${one.was.length} ${one.probability} ${one.text}`;
    if (span.dataset.key === key) return;
    span.dataset.key = key;
    span.dataset.state = one.state;
    span.className = `token ${one.state}${one.fresh ? " fresh" : ""}${one.was.length ? " was-edited" : ""}`;
    if (this.active === one.position) span.classList.add("active");
    const { gap, ink, tail } = parts(one);
    if (SPECIAL.test(one.text)) span.classList.add("special");
    else if (ink === "↵") span.classList.add("break");
    const word = document.createElement("span");
    word.className = "ink";
    word.textContent = ink;
    if (one.probability !== null) word.style.setProperty("--sure", String(one.probability));
    span.replaceChildren(gap, word, tail);
  }

  keydown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (event.key in moves) this.move(moves[event.key]);
    else if (!this.onKey(event.key)) return;
    event.preventDefault();
  }

  /** Look at the token so many further on; the first written one where none was looked at. */
  move(by) {
    if (this.cells.length === 0) return;
    const now = this.cells.findIndex((one) => one.position === this.active);
    const first = Math.max(this.cells.findIndex((one) => one.state !== "prompt"), 0);
    const next = now < 0 && Number.isFinite(by) ? first : Math.min(Math.max(now + by, 0), this.cells.length - 1);
    this.activate(this.cells[next].position);
    this.spans.get(this.active)?.scrollIntoView({ block: "nearest" });
  }

  activate(position) {
    if (this.active !== null) this.spans.get(this.active)?.classList.remove("active");
    this.active = position;
    const one = this.cells.find((other) => other.position === position);
    if (!one) {
      this.hideTip();
      this.readout.textContent = "";
      return;
    }
    this.spans.get(position).classList.add("active");
    const words = `Token ${position + 1}: ${describe(one)}`;
    if (this.readout.textContent !== words) this.readout.textContent = words;
    this.showTip(one);
  }

  hover(event) {
    const span = event.target.closest?.(".token");
    const one = span && this.cells.find((other) => String(other.position) === span.dataset.position);
    if (one) this.showTip(one); else this.hideTip();
  }

  showTip(one) {
    const box = this.spans.get(one.position).querySelector(".ink").getBoundingClientRect();
    this.tip.textContent = describe(one);
    this.tip.hidden = false;
    const room = document.documentElement.clientWidth - this.tip.offsetWidth - 8;
    this.tip.style.left = `${Math.max(8, Math.min(box.left, room)) + window.scrollX}px`;
    const above = box.top - this.tip.offsetHeight - 6;
    this.tip.style.top = `${(above < 4 ? box.bottom + 6 : above) + window.scrollY}px`;
  }

  hideTip() {
    this.tip.hidden = true;
  }
}
