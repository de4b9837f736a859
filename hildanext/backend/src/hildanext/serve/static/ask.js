/** The form: what is asked, as the body of POST /generate, and the conversation so far. */

import { ApiError } from "./api.js";
import { Knobs } from "./knobs.js";

/** The method that is a mode of its own, and no decoder to choose under another mode. */
const EXACT = "exact";

const $ = (id) => document.getElementById(id);

const NUMBERS = {
  seed: { id: "seed", name: "seed" },
  max_new_tokens: { id: "max-tokens", name: "most tokens" },
};

/** Fields by the names that errors use for them; those of the decoder's knobs come from the server. */
export const FIELDS = {
  ...Object.fromEntries(Object.entries(NUMBERS).map(([name, { id }]) => [name, $(id)])),
  max_tokens: $("max-tokens"),
  effort: $("effort"),
  stop: $("stop"),
  prompt: $("prompt"),
  messages: $("prompt"),
};

export class Ask {
  constructor() {
    this.turns = [];
    this.modes = {};
    this.decoders = {};
    this.knobs = new Knobs($("knobs"), FIELDS);
    for (const radio of document.querySelectorAll("input[name=kind]")) radio.addEventListener("change", () => this.showKind());
    for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", () => this.showDefaults());
    for (const id of ["effort", "model", "decoder"]) $(id).addEventListener("change", () => this.showDefaults());
    $("settings").addEventListener("change", () => this.showDefaults());
    $("forget").addEventListener("click", () => { this.turns = []; this.showTurns(); $("prompt").focus(); });
    this.showKind();
    this.showDefaults();
  }

  get isChat() {
    return document.querySelector("input[name=kind]:checked").value === "chat";
  }

  get mode() {
    return document.querySelector("input[name=mode]:checked").value;
  }

  /** Whether the parent alone is asked. */
  get parentOnly() {
    return $("model").value === "parent";
  }

  get wantsParent() {
    return $("compare").checked && !$("compare-field").hidden && !this.parentOnly;
  }

  /** The decoder that modes are presets of. */
  get presetDecoder() {
    return this.modes[this.mode]?.name;
  }

  /** Whether the parent's own text is asked for, drafted. */
  get isExact() {
    return !this.parentOnly && this.presetDecoder === EXACT;
  }

  get decoder() {
    if (this.presetDecoder === EXACT) return EXACT;
    return $("decoder").value || this.presetDecoder;
  }

  /** Offer what the server has. */
  offer(health) {
    this.modes = health.modes ?? this.modes;
    this.decoders = health.decoders ?? this.decoders;
    this.drafts = health.engine.drafts ?? 0;
    this.offerModes();
    const chosen = $("decoder").value, named = Object.keys(this.decoders).filter((name) => name !== EXACT);
    $("decoder").replaceChildren(...named.map((name) => new Option(name, name)));
    $("decoder").value = named.includes(chosen) ? chosen : named.includes(this.presetDecoder) ? this.presetDecoder : named[0];
    const now = $("model").value;
    const kind = Object.values(this.modes).every(({ name }) => name === EXACT) ? "drafts for its parent" : "diffusion";
    const options = [["diffusion", `${health.model} (${kind})`]];
    if (health.parent) options.push(["parent", `${health.parent} (autoregressive parent)`]);
    $("model").replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    $("model").value = options.some(([value]) => value === now) ? now : "diffusion";
    $("compare-field").hidden = !health.parent || this.parentOnly;
    this.hasParent = Boolean(health.parent);
    $("chat-note").hidden = health.engine.chat_template !== false;
    this.showDefaults();
  }

  /** Show the modes that there are, one of them chosen. */
  offerModes() {
    const radios = [...document.querySelectorAll("input[name=mode]")];
    for (const radio of radios) radio.closest("label").hidden = !(radio.value in this.modes);
    if (!(this.mode in this.modes)) radios.find((radio) => radio.value in this.modes).checked = true;
  }

  /** The body of a request. Throws `ApiError` for what is no number. */
  body() {
    const body = { max_new_tokens: null, ...this.source(), ...this.numbers() };
    const stop = $("stop").value.split("\n").filter((line) => line !== "");
    if (stop.length) body.stop = stop;
    if (this.parentOnly) return { ...body, ...this.knobs.values(true), parent: true };
    const knobs = this.knobs.values(false);
    if (this.isExact) return { ...body, ...this.exactly(knobs) };
    if (this.decoder !== this.presetDecoder) return { ...body, decoder: { name: this.decoder, ...knobs } };
    return { ...body, ...knobs, mode: this.mode, ...($("effort").value ? { effort: $("effort").value } : {}) };
  }

  /** Exact mode's own knobs stand in its section; those of sampling are the parent's too. */
  exactly(knobs) {
    const usual = this.drafts ? {} : { drafter: "ngram" };  // without adapters drafts come from the text
    const { sampling, own } = this.knobs.parted({ ...usual, ...knobs });
    return { ...sampling, mode: this.mode, ...(Object.keys(own).length ? { decoder: own } : {}) };
  }

  source() {
    const text = $("prompt").value;
    if (!this.isChat) return { prompt: text };
    if (text.trim() === "") throw new ApiError("the message is empty", { hint: "write something first", param: "messages" });
    const system = $("system").value.trim();
    const before = system ? [{ role: "system", content: system }] : [];
    return { messages: [...before, ...this.turns, { role: "user", content: text }] };
  }

  numbers() {
    const found = {};
    for (const [field, { id, name }] of Object.entries(NUMBERS)) {
      const input = $(id);
      if (input.validity.badInput) throw new ApiError(`“${name}” is not a number`, { hint: "change it, or leave it empty", param: field });
      if (input.value !== "") found[field] = Number(input.value);
    }
    return found;
  }

  /** The same request for the parent: what is about editing stays away. */
  forParent(body) {
    return { ...this.knobs.without(body), parent: true };
  }

  /** An answer came: in a chat it is the next turn, which the canvas shows as long as it is the last. */
  answered(body, text) {
    if (!this.isChat) return;
    this.turns = [...body.messages.filter((turn) => turn.role !== "system"), { role: "assistant", content: text }];
    $("prompt").value = "";
    this.showTurns(1);
  }

  showKind() {
    $("chat").hidden = !this.isChat;
    $("prompt-label").textContent = this.isChat ? "Your message" : "Beginning";
    if (this.isChat && $("prompt").value === $("prompt").defaultValue) $("prompt").value = "";
    if (!this.isChat && $("prompt").value === "") $("prompt").value = $("prompt").defaultValue;
  }

  /** Draw the conversation; the last `elsewhere` of its turns stand somewhere else. */
  showTurns(elsewhere = 0) {
    $("turns").replaceChildren(...this.turns.slice(0, this.turns.length - elsewhere).map(({ role, content }) => {
      const turn = document.createElement("li");
      const who = document.createElement("b");
      turn.className = role;
      who.textContent = role === "user" ? "You" : "Model";
      turn.append(who, content);
      return turn;
    }));
    $("forget").hidden = this.turns.length === 0;
    $("turns").scrollTop = $("turns").scrollHeight;
  }

  /** What an empty field stands for, and the settings in one line. */
  showDefaults() {
    const isPreset = this.decoder === this.presetDecoder;
    const schema = this.decoders[this.parentOnly ? this.presetDecoder : this.decoder];
    if (schema) this.knobs.show(schema);
    const laid = isPreset && !this.isExact && Boolean($("effort").value) && $("effort").value !== "medium";
    this.knobs.describe(isPreset ? this.modes[this.mode] ?? {} : {}, laid, this.parentOnly);
    $("presets").hidden = this.parentOnly || !isPreset;
    $("effort-field").hidden = this.isExact;
    $("decoder-field").hidden = this.parentOnly || this.isExact || $("decoder").options.length < 2;
    $("decoder-note").textContent = schema?.description ?? "";
    $("compare-field").hidden = !this.hasParent || this.parentOnly;
    const diffusion = this.isExact ? ["exact mode"] : isPreset ? [`mode ${this.mode[0]}`, $("effort").value && `${$("effort").value} effort`] : [this.decoder];
    const told = this.parentOnly ? ["AR parent"] : diffusion;
    $("settings-brief").textContent = [...told, `${$("max-tokens").value || 256} tokens`].filter(Boolean).join(", ");
  }
}
