/** The form: what is asked, as the body of POST /generate, and the conversation so far. */

import { ApiError } from "./api.js";

const $ = (id) => document.getElementById(id);

const NUMBERS = {
  tau_mask: { id: "tau-mask", name: "fill a mask above" },
  tau_edit: { id: "tau-edit", name: "edit a word above" },
  temperature: { id: "temperature", name: "temperature" },
  seed: { id: "seed", name: "seed" },
  max_new_tokens: { id: "max-tokens", name: "most tokens" },
};
const DIFFUSION_ONLY = ["tau_mask", "tau_edit"];

/** Fields by the names that errors use for them. */
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
    this.modes = { S_MODE: { tau_mask: 0.5, tau_edit: 0 }, Q_MODE: { tau_mask: 0.7, tau_edit: 0.5 } };
    for (const radio of document.querySelectorAll("input[name=kind]")) radio.addEventListener("change", () => this.showKind());
    for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", () => this.showDefaults());
    for (const id of ["effort", "model", "never-edit"]) $(id).addEventListener("change", () => this.showDefaults());
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

  /** Offer what the server has. */
  offer(health) {
    this.modes = health.modes ?? this.modes;
    const now = $("model").value;
    const options = [["diffusion", `${health.model} (diffusion)`]];
    if (health.parent) options.push(["parent", `${health.parent} (autoregressive parent)`]);
    $("model").replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    $("model").value = options.some(([value]) => value === now) ? now : "diffusion";
    $("compare-field").hidden = !health.parent || this.parentOnly;
    this.hasParent = Boolean(health.parent);
    $("chat-note").hidden = health.engine.chat_template !== false;
    this.showDefaults();
  }

  /** The body of a request. Throws `ApiError` for what is no number. */
  body() {
    const body = { max_new_tokens: null, ...this.source(), ...this.numbers() };
    const stop = $("stop").value.split("\n").filter((line) => line !== "");
    if (stop.length) body.stop = stop;
    if (this.parentOnly) return { ...body, parent: true };
    return { ...body, mode: this.mode, ...($("effort").value ? { effort: $("effort").value } : {}) };
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
      if (this.parentOnly && DIFFUSION_ONLY.includes(field)) continue;
      const input = $(id);
      if (input.validity.badInput) throw new ApiError(`“${name}” is not a number`, { hint: "change it, or leave it empty", param: field });
      if (input.value !== "") found[field] = Number(input.value);
    }
    if ($("never-edit").checked && !this.parentOnly) found.tau_edit = "off";
    return found;
  }

  /** The same request for the parent: what is about editing stays away. */
  forParent(body) {
    const { mode, effort, tau_mask, tau_edit, ...rest } = body;
    return { ...rest, parent: true };
  }

  /** An answer came: in a chat it is the next turn. */
  answered(body, text) {
    if (!this.isChat) return;
    this.turns = [...body.messages.filter((turn) => turn.role !== "system"), { role: "assistant", content: text }];
    $("prompt").value = "";
    this.showTurns();
  }

  showKind() {
    $("chat").hidden = !this.isChat;
    $("prompt-label").textContent = this.isChat ? "Your message" : "Beginning";
    if (this.isChat && $("prompt").value === $("prompt").defaultValue) $("prompt").value = "";
    if (!this.isChat && $("prompt").value === "") $("prompt").value = $("prompt").defaultValue;
  }

  showTurns() {
    $("turns").replaceChildren(...this.turns.map(({ role, content }) => {
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
    const { tau_mask, tau_edit } = this.modes[this.mode] ?? {};
    const laid = $("effort").value && $("effort").value !== "medium";
    $("tau-mask").placeholder = laid ? "as the effort says" : String(tau_mask ?? "");
    $("tau-edit").placeholder = laid ? "as the effort says" : String(tau_edit ?? "");
    $("tau-edit").disabled = $("never-edit").checked;
    $("diffusion-settings").hidden = this.parentOnly;
    $("compare-field").hidden = !this.hasParent || this.parentOnly;
    const told = this.parentOnly ? ["AR parent"] : [`mode ${this.mode[0]}`, $("effort").value && `${$("effort").value} effort`];
    $("settings-brief").textContent = [...told, `${$("max-tokens").value || 256} tokens`].filter(Boolean).join(", ");
  }
}
