/** One answer after another: asks, draws what comes, and leaves it to be replayed. */

import { ApiError, events, postJson } from "./api.js";
import { Canvas } from "./canvas.js";
import { drawFigures, figuresOf, number, sameText, seconds, verdict, verdictOf } from "./figures.js";
import { Player } from "./player.js";
import { Recording } from "./recording.js";

const REPEATS = 5;

const $ = (id) => document.getElementById(id);

/** A model's half of the bench: its sheet, what it said, what it cost. */
class Side {
  constructor(name, onKey) {
    this.name = name;
    this.sheet = $(`${name}-sheet`);
    this.place = $(`${name}-canvas`);
    this.list = $(`${name}-figures`);
    this.canvas = new Canvas(this.place, $("tip"), { readout: $("readout"), onKey });
    this.reset();
  }

  /** What will happen: the text that is given, and a block of hidden positions behind it. */
  preview(text, block) {
    const hidden = Array.from({ length: block }, (_, at) => ({ position: at + 1, text: "", state: "mask" }));
    const cells = [{ position: 0, text, state: "prompt" }, ...hidden];
    this.canvas.draw(cells.map((one) => ({ probability: null, forward: null, was: [], fresh: false, ...one })));
  }

  reset(note = "") {
    this.recording = new Recording();
    this.answer = null;
    this.firstText = null;
    this.text = "";
    this.list.replaceChildren();
    this.place.style.minHeight = "";
    this.canvas.clear(note);
    this.waiting(false);
    this.sheet.removeAttribute("data-state");
  }

  /** Keep the height that the whole text takes, so that nothing below it moves while it is replayed. */
  hold() {
    this.place.style.minHeight = `${this.place.getBoundingClientRect().height}px`;
  }

  waiting(is) {
    this.place.classList.toggle("waiting", is);
    this.place.setAttribute("aria-busy", String(is));
  }

  /** Draw the newest moment, at most once a frame of the screen. */
  drawSoon() {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = null;
      this.showAt(this.recording.length);
      this.canvas.follow();
    });
  }

  drawNow() {
    if (this.drawing) cancelAnimationFrame(this.drawing);
    this.drawing = null;
    this.showAt(this.recording.length);
  }

  /** The document and its figures after so many moments. */
  showAt(count) {
    this.canvas.draw(this.recording.at(count));
    if (this.recording.length > 0) drawFigures(this.list, this.figures(count));
  }

  /** Figures of a moment, from what was seen until then; of the last one the service's own, which know all forwards. */
  figures(count = this.recording.length) {
    const soon = this.name === "parent" || this.exact;
    const shared = { firstName: soon ? "to the first token" : "to the first block", withEdits: this.name !== "parent" };
    if (this.answer && count === this.recording.length) return { ...shared, ...figuresOf(this.answer) };
    const { tokens: drawn, forwards, edits, seconds: now } = this.recording.tally(count);
    // A piece of text alone may be several tokens; it is one each where the answer counts as many, but for its end.
    const single = this.answer && this.answer.usage.completion_tokens - this.recording.length <= 1;
    const tokens = this.framed || single ? drawn : null;
    const first = this.answer?.timing.first_block_seconds ?? this.firstText;
    return {
      ...shared, tokens, forwards, edits, seconds: now, first: first !== null && first <= now ? first : null,
      tokensPerSecond: now > 0 && tokens !== null ? tokens / now : null,
      tokensPerForward: forwards ? tokens / forwards : null,
    };
  }

  /** Take one event of the stream that answers `body`. Of a chat the answer alone is drawn: its turns stand above. */
  take({ event, data }, { prompt, messages }) {
    if (event === "start") {
      this.sheet.querySelector("h2 .note").textContent = data.model;
      const cells = data.prompt.length ? data.prompt : prompt ? [{ position: 0, text: prompt }] : [];
      this.recording.setPrompt(messages ? [] : cells);
    } else if (event === "frame") {
      this.framed = true;
      this.recording.addStep(data, data.seconds);
    } else if (event === "block") {
      this.firstText ??= data.seconds;
      this.text += data.text;
      if (!this.framed) this.recording.addText(data.text, data.seconds);
    } else if (event === "done") {
      this.answer = data;
      this.text = data.text;
      const kept = this.framed ? data.usage.prompt_tokens + data.usage.completion_tokens : null;
      this.recording.end(data.timing.seconds, kept);
    } else if (event === "error") {
      const { message, param = null } = data.error ?? {};
      throw new ApiError(message ?? "the answer broke off", { param, status: 500 });
    }
    this.drawSoon();
  }

  /** Ask and draw until the answer is whole. Throws `ApiError`, or what an abort throws. */
  async run(body, signal) {
    this.framed = false;
    this.waiting(true);
    try {
      for await (const event of events("generate/stream", { method: "POST", body, signal })) this.take(event, body);
      if (!this.answer) throw new ApiError("the answer broke off before its end", { hint: "see the server's log" });
    } finally {
      this.waiting(false);
      this.drawNow();
      this.sheet.dataset.state = this.answer ? "done" : "broken";
    }
  }
}

export class Bench {
  constructor() {
    const onKey = (key) => this.key(key);
    this.sides = { diffusion: new Side("diffusion", onKey), parent: new Side("parent", onKey) };
    this.shown = [];
    const ids = ["player", "play", "back", "ahead", "scrub", "moment", "speed"];
    this.player = new Player(Object.fromEntries(ids.map((id) => [id, $(id)])), (time) => this.showAt(time));
    this.abort = null;
    $("copy").addEventListener("click", () => this.copy());
  }

  /** Who writes beside the parent. */
  get name() {
    return this.sides.diffusion.exact ? "exact mode" : "diffusion model";
  }

  get running() {
    return this.abort !== null;
  }

  /** Before anything was written: what will be. */
  preview(text, block) {
    if (this.shown.length === 0) this.sides.diffusion.preview(text, block);
  }

  stop() {
    this.abort?.abort();
  }

  /**
   * Run the bodies one after the other, so that none is timed while another computes.
   * @param {["diffusion"|"parent", object][]} tasks
   * @returns the answer of the first; throws `ApiError`, or an AbortError where it was stopped
   */
  async run(tasks) {
    this.abort = new AbortController();
    this.player.close();
    this.tasks = tasks;
    $("verdict").textContent = $("readout").textContent = "";
    $("repeat").hidden = true;
    this.shown = tasks.map(([name]) => this.sides[name]);
    this.sides.diffusion.exact = tasks[0][1].mode === "exact";
    $("diffusion-name").textContent = this.name[0].toUpperCase() + this.name.slice(1);
    for (const side of Object.values(this.sides)) {
      side.reset(side === this.shown[0] ? "" : `Waits until the ${this.name} is done, so that both are timed alone.`);
      side.sheet.hidden = !this.shown.includes(side);
    }
    $("announce").textContent = "Writing.";
    this.shown[0].sheet.scrollIntoView({ block: "nearest" });
    try {
      for (const [name, body] of tasks) await this.sides[name].run(body, this.abort.signal);
      this.tell();
      return this.shown[0].answer;
    } catch (problem) {
      $("announce").textContent = problem.name === "AbortError" ? "Stopped." : "";
      for (const side of this.shown) if (side.recording.length === 0) side.canvas.clear("Nothing was written.");
      throw problem;
    } finally {
      this.abort = null;
      for (const side of this.shown) side.hold();
      this.player.open(this.shown.map((side) => side.recording));
    }
  }

  /** Results in words: for a screen reader what was written, for all how the two compare. */
  tell() {
    const [first, second] = this.shown;
    const figures = first.figures();
    const speed = `${number(figures.tokensPerSecond, 1)} tokens per second, ${figures.forwards} forwards, ${seconds(figures.seconds)}`;
    $("announce").textContent = `Done: ${speed}. ${first.text}`;
    if (!second) return;
    const same = first.exact ? ` ${sameText(first.text, second.text)}` : "";
    $("verdict").textContent = verdict(figures, second.figures(), this.name) + same;
    $("repeat").hidden = false;
  }

  /** Ask for both texts again and again, in turns and unwatched, and say what that tells. Throws as `run` does. */
  async repeat() {
    this.abort = new AbortController();
    this.player.pause();
    const place = $("verdict"), before = place.textContent, pairs = [];
    $("repeat").hidden = true;
    try {
      while (pairs.length < REPEATS) {
        place.textContent = `${before} Repeating, ${pairs.length + 1} of ${REPEATS} …`;
        const order = pairs.length % 2 ? this.tasks.toReversed() : this.tasks;  // whoever comes second gains nothing by it
        const pair = {};
        for (const [name, body] of order) pair[name] = figuresOf(await postJson("generate", body, this.abort.signal));
        pairs.push(pair);
      }
      place.textContent = verdictOf(pairs, this.name);
    } catch (problem) {
      place.textContent = before;
      throw problem;
    } finally {
      this.abort = null;
      $("repeat").hidden = false;
    }
  }

  showAt(time) {
    for (const side of this.shown) {
      if (side.recording.length > 0) side.showAt(side.recording.countAt(time));
    }
  }

  key(key) {
    if (this.running) return false;
    if (key === " ") this.player.toggle();
    else if (key === ",") this.player.step(-1);
    else if (key === ".") this.player.step(1);
    else return false;
    return true;
  }

  async copy() {
    const text = this.shown.map((side) => side.text).join("\n\n");
    try {
      await navigator.clipboard.writeText(text);
      $("announce").textContent = $("copy").textContent = "Copied";
    } catch {  // not allowed, or not over https
      $("announce").textContent = $("copy").textContent = "Not allowed here";
    }
    setTimeout(() => { $("copy").textContent = "Copy text"; }, 2000);
  }
}
