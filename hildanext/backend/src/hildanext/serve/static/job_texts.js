/** The texts that a job wrote: which of its files holds them, and how they are read. */

import { getBlob } from "./api.js";
import { make } from "./dom.js";

const SHOWN = 60;
const LARGEST = 8e6;  // bytes that are fetched without being asked for

/** The file of texts among a job's, as its outcomes name it; null where it wrote none. */
export function textsFile(outcomes, artefacts) {
  for (const { samples, answers } of Object.values(outcomes ?? {})) {
    const path = samples ?? answers;
    const found = typeof path === "string" && artefacts.find((one) => path.replaceAll("\\", "/").endsWith(`/${one.path}`));
    if (found) return found;
  }
  return null;
}

/** Samples, or answers line by line, in the order in which they are shown: the texts of a prompt one after another. */
export function parseTexts(text, path) {
  const read = path.endsWith(".jsonl")
    ? text.split("\n").filter((line) => line.trim() !== "").map((line) => JSON.parse(line)) : JSON.parse(text).samples;
  const groups = new Map();
  for (const one of read) {
    const prompt = one.prompt ?? (one.messages ?? []).map(({ role, content }) => `${role}: ${content}`).join("\n");
    groups.set(prompt, [...(groups.get(prompt) ?? []), { ...one, prompt }]);
  }
  return [...groups.values()].flat();
}

function draw({ way, prompt, text, error, tokens, forwards, edits, tokens_per_second: speed }) {
  const told = [way];
  if (tokens !== undefined) told.push(`${tokens} tokens in ${forwards} forwards`);
  if (edits) told.push(`${edits} edits`);
  if (speed !== undefined) told.push(`${speed.toFixed(1)} tokens/s`);
  const written = error === undefined ? text : make("span", { className: "job-error", textContent: error });
  return make("li", {}, make("p", {}, make("span", { className: "given", textContent: prompt }), written),
    make("p", { className: "note", textContent: told.join(" · ") }));
}

/** A list of what a file holds, or why it is not shown. */
export async function showTexts({ path, size }, address) {
  if (size > LARGEST) return make("p", { className: "note", textContent: `${path} is large: see Files.` });
  const texts = parseTexts(await (await getBlob(address)).text(), path);
  const list = make("ol", { className: "texts", ariaLabel: "Texts" }, ...texts.slice(0, SHOWN).map(draw));
  const more = texts.length - SHOWN;
  return more > 0 ? make("div", {}, list, make("p", { className: "note", textContent: `and ${more} more in ${path}` })) : list;
}
