/** Fields for the knobs of a decoder, made from what the server says of them (JSON Schema). Knows no decoder. */

import { ApiError } from "./api.js";
import { make } from "./dom.js";

/** What the autoregressive parent reads of a decoder, too. */
const SAMPLING = ["temperature", "top_p", "top_k"];

/** A knob's type, its bounds, and whether null is a value. */
function kindOf(knob) {
  const branches = knob.anyOf ?? [knob];
  const kind = branches.find((branch) => branch.type !== "null") ?? {};
  return { ...kind, nullable: branches.some((branch) => branch.type === "null") };
}

function labelOf(name, knob) {
  const title = knob.title ?? name;
  return title[0].toUpperCase() + title.slice(1).toLowerCase();
}

function inputFor(id, knob, kind) {
  if (kind.enum) return make("select", { id }, new Option("", ""), ...kind.enum.map((value) => new Option(value, value)));
  if (kind.type === "boolean") return make("input", { id, type: "checkbox", checked: knob.default === true });
  if (kind.type !== "number" && kind.type !== "integer") return make("input", { id, type: "text", spellcheck: false });
  const whole = kind.type === "integer";
  const input = make("input", { id, type: "number", step: whole ? "1" : "any", inputMode: whole ? "numeric" : "decimal" });
  for (const [bound, name] of [[kind.minimum, "min"], [kind.exclusiveMinimum, "min"], [kind.maximum, "max"]]) {
    if (bound !== undefined) input[name] = bound;
  }
  return input;
}

export class Knobs {
  /** @param fields where fields are noted by the names that errors use for them */
  constructor(place, fields) {
    this.place = place;
    this.fields = fields;
    this.knobs = [];
    this.drawn = "";
  }

  /** Make the fields of a decoder; where they are there already, what was typed stays. */
  show(schema) {
    const told = JSON.stringify(schema);
    if (told === this.drawn) return;
    this.drawn = told;
    for (const { name } of this.knobs) delete this.fields[name];
    const { name: _, ...properties } = schema.properties;
    this.knobs = Object.entries(properties).map(([name, knob]) => this.knob(name, knob));
    this.place.replaceChildren(...this.knobs.map(({ field }) => field));
  }

  knob(name, knob) {
    const id = name.replaceAll("_", "-"), kind = kindOf(knob), label = labelOf(name, knob);
    const input = inputFor(id, knob, kind);
    if (knob.description) input.setAttribute("aria-description", knob.description);
    const field = make("div", { className: "field", title: knob.description ?? "" });
    if (kind.type === "boolean") field.append(make("label", { className: "tick" }, input, make("span", {}, label)));
    else field.append(make("label", { htmlFor: id }, label), input);
    let off = null;
    if (kind.nullable && knob.default !== null) {
      off = make("input", { id: `${id}-off`, type: "checkbox" });
      field.append(make("label", { className: "tick" }, off, " ", make("span", {}, "never")));
    }
    this.fields[name] = input;
    return { name, kind, label, input, off, field, default: knob.default };
  }

  /** What empty fields stand for, and which fields are of use: the parent samples, and does nothing else. */
  describe(preset, laid, parentOnly) {
    for (const { name, input, off, field, ...knob } of this.knobs) {
      const usual = preset[name] ?? knob.default;
      input.placeholder = laid && name in preset ? "as the effort says" : String(usual ?? "off");
      if (off) input.disabled = off.checked;
      field.hidden = parentOnly && !SAMPLING.includes(name);
    }
  }

  /** What was chosen. Throws `ApiError` for what is no number. */
  values(parentOnly) {
    const chosen = {};
    for (const { name, kind, label, input, off, ...knob } of this.knobs) {
      if (parentOnly && !SAMPLING.includes(name)) continue;
      if (input.validity.badInput) throw new ApiError(`“${label}” is not a number`, { hint: "change it, or leave it empty", param: name });
      if (off?.checked) chosen[name] = "off";
      else if (kind.type === "boolean") { if (input.checked !== (knob.default === true)) chosen[name] = input.checked; }
      else if (input.value !== "") chosen[name] = input.type === "number" ? Number(input.value) : input.value;
    }
    return chosen;
  }

  /** What was chosen, in two: what the parent reads, too, and what it does not. */
  parted(chosen) {
    const of = (sampling) => Object.fromEntries(Object.entries(chosen).filter(([name]) => SAMPLING.includes(name) === sampling));
    return { sampling: of(true), own: of(false) };
  }

  /** Of a body, what the parent is not told. */
  without(body) {
    const { mode, effort, decoder, ...rest } = body;
    const hidden = this.knobs.map(({ name }) => name).filter((name) => !SAMPLING.includes(name));
    return Object.fromEntries(Object.entries(rest).filter(([name]) => !hidden.includes(name)));
  }
}
