/** What was seen of one answer, and how the document looked at each of its moments. Pure: knows no page. */

/** Tokens that are marks of the model's and no text, as the end of text. */
export const SPECIAL = /^<(\|[A-Za-z_]+\||\/?[A-Za-z_]+)>$/;

/**
 * A position of the document as it looks at one moment.
 * @typedef {{position: number, text: string, state: "prompt"|"mask"|"draft"|"edited"|"committed",
 *   bytes: number[]|null, probability: number|null, forward: number|null, was: string[], fresh: boolean}} Cell
 */

function cell(position, text, state, bytes = null) {
  return { position, text, state, bytes, probability: null, forward: null, was: [], fresh: false };
}

const continues = (byte) => byte >= 0x80 && byte < 0xc0;

/** The same cells; characters that several tokens make up stand in the last of them. */
function joined(cells) {
  const shown = [...cells];
  for (let begin = 0, end; begin < cells.length; begin = end) {
    end = begin + 1;
    if (!cells[begin].bytes) continue;
    while (cells[end]?.bytes && continues(cells[end].bytes[0])) end++;
    const bytes = cells.slice(begin, end).flatMap((one) => one.bytes);
    const text = new TextDecoder().decode(Uint8Array.from(bytes));
    for (let at = begin; at < end; at++) shown[at] = { ...cells[at], text: at === end - 1 ? text : "" };
  }
  return shown;
}

const SHOWN_PROMPT = 400;  // tokens; of a longer prompt the end is drawn

export class Recording {
  constructor() {
    this.prompt = [];
    /** In order: {seconds, record} for a forward, {seconds, text} for final text alone. */
    this.moments = [];
    this.seconds = null;
    this.kept = null;
    this.rewind();
  }

  get length() {
    return this.moments.length;
  }

  /** @param {{position: number, text: string}[]} cells */
  setPrompt(cells) {
    const left = cells.length - SHOWN_PROMPT;
    const before = left > 0 ? [{ position: cells[left].position - 1, text: `(${left} tokens more) … ` }] : [];
    this.prompt = [...before, ...cells.slice(-SHOWN_PROMPT)];
    this.rewind();
  }

  addStep(record, seconds) {
    this.moments.push({ seconds, record });
  }

  addText(text, seconds) {
    this.moments.push({ seconds, text });
  }

  /** The answer is whole: positions from `kept` on were cut from it. */
  end(seconds, kept) {
    this.seconds = seconds;
    this.kept = kept;
  }

  /** How many moments had happened after so many seconds. */
  countAt(seconds) {
    let low = 0, high = this.moments.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.moments[middle].seconds <= seconds) low = middle + 1; else high = middle;
    }
    return low;
  }

  /** The cells after the first `count` moments, by position. What a finished answer does not hold is left out. */
  at(count) {
    if (count < this.count) this.rewind();
    while (this.count < count) this.apply(this.moments[this.count++]);
    const whole = this.kept !== null && count === this.moments.length;
    const cells = [...this.cells.values()].filter((one) => !whole || one.position < this.kept);
    return joined(cells.sort((one, other) => one.position - other.position));
  }

  /** What the first `count` moments had brought: tokens that stand there (none that a finished answer leaves out),
   *  forwards, edits and seconds. Forwards are null where the moments are of text alone. */
  tally(count) {
    let edits = 0, forwards = null;
    for (const { record } of this.moments.slice(0, count)) {
      if (!record) continue;
      edits += record.edits.length;
      forwards = record.forward;
    }
    const written = this.at(count).filter((one) => one.state !== "prompt" && one.state !== "mask");
    const tokens = written.filter((one) => this.kept === null || one.position < this.kept).length;
    return { edits, forwards, tokens, seconds: count > 0 ? this.moments[count - 1].seconds : 0 };
  }

  rewind() {
    this.count = 0;
    this.fresh = [];  // written by the newest moment
    this.open = new Set();  // written in a block that is not final
    this.cells = new Map(this.prompt.map((one) => [one.position, cell(one.position, one.text, "prompt", one.bytes)]));
  }

  apply({ record, text }) {
    for (const one of this.fresh) {
      one.fresh = false;
      if (one.revised) one.state = "committed";
    }
    this.fresh = [];
    if (record) this.applyStep(record);
    else this.applyText(text);
  }

  write(one) {
    this.fresh.push(one);
    this.open.delete(this.cells.get(one.position));
    if (one.state !== "committed" && !one.revised) this.open.add(one);
    this.cells.set(one.position, one);
  }

  applyText(text) {
    const position = this.cells.size === 0 ? 0 : [...this.cells.keys()].at(-1) + 1;
    this.write({ ...cell(position, text, "committed"), fresh: true });
  }

  applyStep(record) {
    const { block_start: start, forward } = record;
    const revised = record.kind === "revise";  // its edits lie in finished blocks
    for (const position of record.masks) this.cells.set(position, cell(position, "", "mask"));
    for (const { position, text, bytes, probability } of record.drafts) {
      this.write({ ...cell(position, text, "draft", bytes), probability, forward, fresh: true });
    }
    for (const { position, old_text, new_text, new_bytes: bytes, probability } of record.edits) {
      const before = this.cells.get(position) ?? cell(position, old_text, "draft");
      const was = [...before.was, old_text];
      this.write({ position, text: new_text, bytes, state: "edited", probability, forward, was, fresh: true, revised });
    }
    if (!record.final || revised) return;
    for (const one of this.open) {
      if (one.position >= start) one.state = "committed";
    }
    this.open.clear();  // blocks are written one after the other
  }
}

function quoted(text) {
  if (SPECIAL.test(text)) return `the mark ${text}, which is no text`;
  return `“${text.replaceAll("\n", "↵").replace(/^ (?=\S)/, "") || " "}”`;
}

/** A cell in words, for a tip and for a screen reader. */
export function describe(one) {
  const shown = quoted(one.text);
  if (one.state === "prompt") return `${shown}, given`;
  if (one.state === "mask") return "hidden still";
  const sure = one.probability === null ? "" : `, probability ${one.probability.toFixed(2)}`;
  const when = one.forward === null ? "" : ` in forward ${one.forward}`;
  const how = one.was.length > 0 ? "edited" : one.state === "committed" && one.forward === null ? "final" : "filled";
  const before = one.was.length > 0 ? `; was ${one.was.map(quoted).join(", then ")}` : "";
  const now = one.state === "committed" && one.forward !== null ? "; final" : "";
  return `${shown}, ${how}${when}${sure}${before}${now}`;
}
