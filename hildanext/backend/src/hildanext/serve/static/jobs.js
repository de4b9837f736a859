/** The jobs' half of the page: submit, the list, and the one that is looked at. */

import { ApiError, getJson, postJson } from "./api.js";
import { JobView, progressOf, stateMark } from "./job_view.js";
import { showProblem } from "./problem.js";

const LIST_SECONDS = 3;
const $ = (id) => document.getElementById(id);

export class JobsView {
  constructor(section) {
    this.section = section;
    this.shown = false;
    this.jobs = [];
    this.next = null;
    this.examples = {};
    this.view = new JobView($("job-title"), $("job-body"), () => this.refresh());
    $("submit").addEventListener("submit", (event) => { event.preventDefault(); this.submit(); });
    $("submit").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.submit(); }
    });
    $("job-kind").addEventListener("change", () => this.showExample());
    $("older").addEventListener("click", () => this.older());
    setInterval(() => { if (this.shown && !document.hidden) this.refresh(); }, LIST_SECONDS * 1000);
  }

  /** Show the view with the job of that id ("" is none), or leave it (null). */
  async show(id) {
    this.shown = id !== null;
    if (id !== this.view.id) {
      this.view.close();
      this.view.id = id;
      if (id) this.open(id);
      else if (id === "") this.showNothing();
    }
    if (!this.shown) return;
    if (Object.keys(this.examples).length === 0) await this.loadExamples();
    await this.refresh();
  }

  open(id) {
    const narrow = !matchMedia("(min-width: 62rem)").matches;
    this.view.open(id);
    if (narrow) $("job").scrollIntoView();
  }

  showNothing() {
    $("job-title").textContent = "No job chosen";
    const note = Object.assign(document.createElement("p"), { className: "blank", textContent: "Choose a job, or submit one." });
    $("job-body").replaceChildren(note);
  }

  async loadExamples() {
    try {
      this.examples = await getJson("static/job_examples.json");
      this.offer(Object.keys(this.examples));
    } catch (problem) {
      showProblem($("list-problem"), problem);
    }
  }

  offer(kinds) {
    const now = $("job-kind").value || "generate";
    if (kinds.join() === [...$("job-kind").options].map((option) => option.value).join()) return;
    $("job-kind").replaceChildren(...kinds.map((kind) => new Option(kind, kind)));
    $("job-kind").value = kinds.includes(now) ? now : kinds[0];
    this.showExample();
  }

  /** Put the kind's example into the field, unless someone has written something else there. */
  showExample() {
    const example = this.examples[$("job-kind").value];
    $("job-kind-note").textContent = example?.about ?? "";
    const field = $("job-config");
    if (field.value.trim() !== "" && field.value !== this.offered) return;
    this.offered = JSON.stringify(example?.config ?? {}, null, 2);
    field.value = this.offered;
  }

  async submit() {
    const box = $("job-problem");
    showProblem(box, null);
    $("job-config").removeAttribute("aria-invalid");
    let config;
    try {
      config = JSON.parse($("job-config").value);
    } catch (problem) {
      $("job-config").setAttribute("aria-invalid", "true");
      showProblem(box, new ApiError("the configuration is no JSON", { hint: problem.message }));
      return;
    }
    try {
      // What has stages of its own is a whole recipe, whichever example it began as.
      const kind = config?.stages !== undefined ? "run" : $("job-kind").value;
      const job = await postJson("jobs/submit", { kind, config });
      $("submit-drop").open = false;
      location.hash = `#jobs/${encodeURIComponent(job.id)}`;
      $("job-title").focus({ preventScroll: true });
    } catch (problem) {
      showProblem(box, problem);
    }
  }

  async refresh() {
    if (!this.shown || this.asking) return;
    this.asking = true;
    try {
      const { jobs, next, kinds } = await getJson("jobs?limit=20");
      const known = new Set(jobs.map((job) => job.id));
      const older = this.jobs.slice(20).filter((job) => !known.has(job.id));
      this.next = older.length ? this.next : next;
      this.jobs = [...jobs, ...older];
      if (kinds?.length) this.offer(kinds);
      this.draw();
      showProblem($("list-problem"), null);
    } catch (problem) {
      if ($("list-problem").textContent !== problem.message + problem.hint) showProblem($("list-problem"), problem);
    } finally {
      this.asking = false;
    }
  }

  async older() {
    try {
      const { jobs, next } = await getJson(`jobs?limit=20&before=${encodeURIComponent(this.next)}`);
      this.jobs.push(...jobs);
      this.next = next;
      this.draw();
    } catch (problem) {
      showProblem($("list-problem"), problem);
    }
  }

  /** Rows are kept and changed, so that the focus stays where it is. */
  draw() {
    const list = $("job-list");
    const rows = new Map([...list.children].map((row) => [row.dataset.id, row]));
    const wanted = this.jobs.map((job) => this.row(job, rows.get(job.id)));
    if (wanted.length !== list.children.length || wanted.some((row, at) => list.children[at] !== row)) {
      list.replaceChildren(...wanted);
    }
    if (wanted.length === 0) {
      list.replaceChildren(Object.assign(document.createElement("li"), { className: "note", textContent: "none yet" }));
    }
    $("older").hidden = !this.next;
  }

  row(job, row) {
    const { share, text } = progressOf(job);
    const key = `${job.state} ${job.cancelling} ${text} ${job.id === this.view.id}`;
    const made = row ?? Object.assign(document.createElement("li"), {});
    if (made.dataset.key === key) return made;
    made.dataset.id = job.id;
    made.dataset.key = key;
    const link = made.querySelector("a") ?? document.createElement("a");
    link.href = `#jobs/${encodeURIComponent(job.id)}`;
    if (job.id === this.view.id) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    const name = Object.assign(document.createElement("b"), { textContent: job.id });
    const note = Object.assign(document.createElement("span"), { className: "note", textContent: text });
    link.replaceChildren(name, stateMark(job), note);
    if (job.state === "running" && share !== null) {
      link.append(Object.assign(document.createElement("progress"), { max: 1, value: share, ariaLabel: `Progress of ${job.id}` }));
    }
    if (!link.parentNode) made.append(link);
    return made;
  }
}
