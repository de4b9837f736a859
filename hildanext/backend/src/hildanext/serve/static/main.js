/** Puts the page together: the head, the form and the bench. */

import { getJson, getKey, setKey } from "./api.js";
import { Ask, FIELDS } from "./ask.js";
import { JobsView } from "./jobs.js";
import { markFields, showProblem } from "./problem.js";
import { Bench } from "./run.js";

const HEALTH_SECONDS = 20;
const $ = (id) => document.getElementById(id);

let block = 8;  // positions that the preview shows as hidden, until the server has told
const ask = new Ask();
const bench = new Bench();
const jobs = new JobsView($("jobs"));

async function lookAtServer() {
  const status = $("status");
  try {
    const health = await getJson("health");
    status.className = "status up";
    say(status, [health.model, health.device, health.dtype, health.engine.name].join(" · "));
    status.title = health.engine.reason;
    ask.offer(health);
    block = health.engine.block_size ?? block;
    preview();
    $("key-drop").hidden = !health.key_required && !getKey();
    document.querySelector("[data-view=jobs]").hidden = !health.jobs;
  } catch (problem) {
    status.className = "status down";
    say(status, problem.message);
  }
}

/** What will be written, before anything was: of a chat the answer alone. */
function preview() {
  bench.preview(ask.isChat ? "" : $("prompt").value, block);
}

/** Live regions speak when their text changes; the same text again is not news. */
function say(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

function showRunning(is) {
  const focused = document.activeElement;
  $("start").hidden = is;
  $("stop-run").hidden = !is;
  if (is && focused === $("start")) $("stop-run").focus();
  if (!is && focused === $("stop-run")) $("start").focus();
}

async function write() {
  if (bench.running) return;
  showProblem($("problem"), null);
  markFields(FIELDS, []);
  try {
    const body = ask.body();
    const tasks = [[ask.parentOnly ? "parent" : "diffusion", body]];
    if (ask.wantsParent) tasks.push(["parent", ask.forParent(body)]);
    ask.showTurns();  // the canvas, where the last answer stood, is about to be cleared
    await running(async () => ask.answered(body, (await bench.run(tasks)).text));
  } catch (problem) {
    failed(problem);
  }
}

/** Do what takes a while; stopping it is no failure. */
async function running(work) {
  showRunning(true);
  try {
    await work();
  } catch (problem) {
    if (problem.name !== "AbortError") failed(problem);
  } finally {
    showRunning(false);
  }
}

function failed(problem) {
  if (problem.status === undefined) throw problem;  // ours: to the console
  showProblem($("problem"), named(problem));
  const names = (problem.param ?? "").split(".");
  markFields(FIELDS, names);
  if (names.some((name) => $("settings").contains(FIELDS[name] ?? null))) $("settings").open = true;
  if (problem.status === 401) askForKey();
  if (problem.status === 0) lookAtServer();
}

/** The service names a field as its requests do; here it has a label. */
function named(problem) {
  const label = FIELDS[problem.param]?.labels?.[0]?.firstChild.textContent.trim();
  const begin = `${problem.param}: `;
  if (!label || !problem.message.startsWith(begin)) return problem;
  return { message: `“${label}” ${problem.message.slice(begin.length)}`, hint: problem.hint };
}

function askForKey() {
  $("key-drop").hidden = false;
  $("key-drop").open = true;
  $("key").setAttribute("aria-invalid", "true");
  $("key").focus();
}

function showView() {
  const view = location.hash.startsWith("#jobs") ? "jobs" : "write";
  for (const section of document.querySelectorAll(".view")) section.hidden = section.id !== view;
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = view === "jobs" ? "Jobs · HILDA" : "HILDA";
  const id = location.hash.slice("#jobs/".length);  // ids need no escapes; what has some is no id
  jobs.show(view === "jobs" ? id : null);
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); write(); });
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); write(); }
});
for (const kind of ["input", "change"]) $("ask").addEventListener(kind, preview);
$("repeat").addEventListener("click", () => { if (!bench.running) running(() => bench.repeat()); });
$("stop-run").addEventListener("click", () => bench.stop());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if ($("key-drop").open) { $("key-drop").open = false; $("key-drop").querySelector("summary").focus(); }
  bench.stop();
});

$("key").value = getKey();
$("key").addEventListener("input", () => { setKey($("key").value.trim()); $("key").removeAttribute("aria-invalid"); });
$("key").addEventListener("change", () => { lookAtServer(); jobs.refresh(); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-drop").open = false;
  $("key-drop").querySelector("summary").focus();
});

$("settings").open = matchMedia("(min-width: 62rem)").matches;
preview();
addEventListener("hashchange", showView);
showView();
lookAtServer();
setInterval(() => { if (!document.hidden && !bench.running) lookAtServer(); }, HEALTH_SECONDS * 1000);
