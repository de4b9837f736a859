/** Replays recordings on one clock: several of them run side by side although they were made one after the other. */

const FOLLOWABLE = 10;  // seconds that a replay takes at least, where the speed is left to us

export class Player {
  /**
   * @param {Record<string, HTMLElement>} parts  player, play, back, ahead, scrub, moment, speed
   * @param {(marks: number) => void} onShow  called with the seconds to show
   */
  constructor(parts, onShow) {
    this.parts = parts;
    this.onShow = onShow;
    this.marks = [];
    this.timer = null;
    parts.play.addEventListener("click", () => this.toggle());
    parts.back.addEventListener("click", () => this.step(-1));
    parts.ahead.addEventListener("click", () => this.step(1));
    parts.scrub.addEventListener("input", () => { this.pause(); this.show(Number(parts.scrub.value)); });
    parts.speed.addEventListener("change", () => { if (this.playing) { this.pause(); this.play(); } });
  }

  get playing() {
    return this.timer !== null;
  }

  /** Take away what there was to replay. */
  close() {
    this.pause();
    this.marks = [];
    this.parts.player.hidden = true;
  }

  /** @param {import("./recording.js").Recording[]} recordings  finished; shown at their end */
  open(recordings) {
    this.pause();
    const moments = recordings.flatMap((one) => one.moments.map((moment) => moment.seconds));
    this.marks = [-1, ...[...new Set(moments)].sort((one, other) => one - other)];
    this.parts.scrub.max = String(this.marks.length - 1);
    this.parts.player.hidden = this.marks.length < 2;
    this.show(this.marks.length - 1);
  }

  show(index) {
    if (this.marks.length === 0) return;
    this.index = Math.min(Math.max(index, 0), this.marks.length - 1);
    const { scrub, moment, back, ahead } = this.parts;
    const time = Math.max(this.marks[this.index], 0);
    scrub.value = String(this.index);
    const last = this.marks.length - 1;
    moment.textContent = `${this.index} of ${last} · ${time.toFixed(2)} s`;
    scrub.setAttribute("aria-valuetext", `step ${this.index} of ${last}, ${time.toFixed(2)} seconds`);
    // A button that goes grey under the finger would lose the focus; it stays, and does nothing.
    back.setAttribute("aria-disabled", String(this.index === 0));
    ahead.setAttribute("aria-disabled", String(this.index === this.marks.length - 1));
    this.onShow(this.marks[this.index]);
  }

  step(by) {
    this.pause();
    this.show(this.index + by);
  }

  toggle() {
    if (this.playing) this.pause(); else this.play();
  }

  /** Times faster than it was. */
  speed() {
    if (this.parts.speed.value !== "auto") return Number(this.parts.speed.value);
    return Math.min(1, this.marks.at(-1) / FOLLOWABLE);
  }

  play() {
    if (this.marks.length < 2) return;
    if (this.index >= this.marks.length - 1) this.show(0);
    const speed = Math.max(this.speed(), 1e-3);
    const from = Math.max(this.marks[this.index], 0);
    const began = performance.now();
    this.parts.play.textContent = "Pause";
    const tick = () => {
      const now = from + (performance.now() - began) / 1000 * speed;
      let next = this.index;
      while (next < this.marks.length - 1 && this.marks[next + 1] <= now) next += 1;
      if (next !== this.index) this.show(next);
      if (next === this.marks.length - 1) this.pause();
      else this.timer = requestAnimationFrame(tick);
    };
    this.timer = requestAnimationFrame(tick);
  }

  pause() {
    if (this.timer !== null) cancelAnimationFrame(this.timer);
    this.timer = null;
    this.parts.play.textContent = "Play";
  }
}
