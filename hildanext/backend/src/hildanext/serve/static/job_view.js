/** One job, live: state, progress, loss curve, log, what it left behind. */

import { events, getBlob, getJson, getKey, postJson } from "./api.js";
import { LossChart } from "./chart.js";
import { make } from "./dom.js";
import { showTexts, textsFile } from "./job_texts.js";
import { showProblem } from "./problem.js";

const LOG_LINES = 500;
const RETRY_SECONDS = 2;
const ENDED = ["succeeded", "failed", "cancelled"];

export function stateMark(job) {
  const text = job.cancelling && job.state === "running" ? "stopping" : job.state;
  return make("span", { className: `state ${job.state}`, textContent: text });
}

/** Progress in one line, and its share where that is known. */
export function progressOf(job) {
  const { stage, stages_done: done = 0, stages = 1, step, done: parts, total, unit, loss, reward, eta_seconds: left } = job.progress;
  const share = total ? Math.min(parts / total, 1) : null;
  const told = [];
  if (stage && stages > 1) told.push(`stage ${Math.min(done + 1, stages)} of ${stages}: ${stage}`);
  if (step !== null && step !== undefined && unit !== "step") told.push(`step ${step}`);
  if (parts !== null && parts !== undefined) {
    told.push(`${parts.toLocaleString("en")}${total ? ` of ${total.toLocaleString("en")}` : ""} ${unit ?? ""}`.trim());
  }
  if (Number.isFinite(reward)) told.push(`reward ${reward.toFixed(3)}`);
  else if (Number.isFinite(loss)) told.push(`loss ${loss.toFixed(3)}`);
  if (job.state === "running" && Number.isFinite(left)) told.push(`about ${remaining(left)} left`);
  return { share: job.state === "succeeded" ? 1 : share, text: told.join(" · ") };
}

function remaining(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function fileSize(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export class JobView {
  /** @param {HTMLElement} title  @param {HTMLElement} body */
  constructor(title, body, onChange) {
    this.title = title;
    this.body = body;
    this.onChange = onChange;
    this.abort = null;
    this.charts = new Map();
  }

  close() {
    this.abort?.abort();
    this.abort = null;
    for (const chart of this.charts.values()) chart.close();
    this.charts.clear();
  }

  async open(id) {
    this.close();
    this.id = id;
    this.abort = new AbortController();
    const { signal } = this.abort;
    this.title.textContent = id;
    this.build();
    try {
      this.show(await getJson(this.path(""), signal));
      await this.showArtefacts(signal);
      await this.follow(signal);
    } catch (problem) {
      if (!signal.aborted) showProblem(this.parts.problem, problem);
    }
  }

  path(rest) {
    return `jobs/${encodeURIComponent(this.id)}${rest}`;
  }

  build() {
    this.shownTexts = null;
    const parts = {
      problem: make("div", { className: "problem", hidden: true }),
      state: make("p", { className: "job-state" }),
      bar: make("progress", { max: 1, ariaLabel: "Progress" }),
      progress: make("p", { className: "note" }),
      cancel: make("button", { type: "button", textContent: "Cancel job" }),
      texts: make("div", {}),
      charts: make("div", { className: "charts" }),
      log: make("pre", { className: "log", tabIndex: 0, ariaLabel: "Log" }),
      artefacts: make("ul", { className: "artefacts" }),
      outcomes: make("pre", { className: "log", tabIndex: 0, ariaLabel: "Results" }),
      config: make("pre", { className: "log", tabIndex: 0, ariaLabel: "Configuration" }),
    };
    parts.problem.setAttribute("role", "alert");
    parts.state.setAttribute("role", "status");
    for (const box of [parts.log, parts.outcomes, parts.config]) box.setAttribute("role", "region");
    parts.cancel.addEventListener("click", () => this.cancel());
    const fold = (name, content) => make("details", {}, make("summary", { textContent: name }), content);
    parts.results = fold("Results", parts.outcomes);
    parts.logFold = fold("Log", parts.log);
    parts.logFold.open = true;
    this.body.replaceChildren(parts.problem, parts.state, make("div", { className: "job-bar" }, parts.bar, parts.cancel),
      parts.progress, parts.texts, parts.charts, parts.logFold, fold("Files", parts.artefacts), parts.results, fold("Configuration", parts.config));
    this.parts = parts;
  }

  show(job) {
    const { parts } = this;
    const { share, text } = progressOf(job);
    const when = job.ended ?? job.started ?? job.created;
    const word = job.ended ? "ended" : job.started ? "started" : "submitted";
    const facts = `${word} ${new Date(when).toLocaleString()}${job.attempts > 1 ? `, attempt ${job.attempts}` : ""}`;
    const key = `${job.state} ${job.cancelling} ${facts} ${job.error}`;
    if (this.shownState !== `${this.id} ${key}`) {
      this.shownState = `${this.id} ${key}`;
      parts.state.replaceChildren(stateMark(job), " ", facts, ...(job.error ? [make("span", { className: "job-error", textContent: job.error })] : []));
    }
    parts.bar.hidden = job.state === "queued" || (share === null && ENDED.includes(job.state));
    if (share === null) parts.bar.removeAttribute("value"); else parts.bar.value = share;
    parts.progress.textContent = text;
    const over = ENDED.includes(job.state);
    if (over && document.activeElement === parts.cancel) this.body.closest("article").querySelector("summary")?.focus();
    parts.cancel.hidden = over;
    parts.cancel.disabled = job.cancelling;
    parts.config.textContent = JSON.stringify(job.config, null, 2);
    parts.results.hidden = !job.outcomes || Object.keys(job.outcomes).length === 0;
    parts.outcomes.textContent = JSON.stringify(job.outcomes ?? {}, null, 2);
    this.job = job;
  }

  async cancel() {
    this.parts.cancel.disabled = true;
    try {
      this.show(await postJson(this.path("/cancel")));
      showProblem(this.parts.problem, null);
    } catch (problem) {
      this.parts.cancel.disabled = false;
      showProblem(this.parts.problem, problem);
    }
    this.onChange();
  }

  /** Take events until the job has ended; where the line breaks, go on after the last one that came. */
  async follow(signal) {
    let after = 0;
    while (!signal.aborted) {
      try {
        for await (const { event, id, data } of events(this.path(`/events?after=${after}`), { signal })) {
          if (event === "end" && data.over) return;
          if (event === "end") break;  // the server is closing: come again
          after = Number(id ?? after);
          showProblem(this.parts.problem, null);
          this.take(event, data.data, signal);
        }
      } catch (problem) {
        if (signal.aborted || !(problem.status === 0 || problem.status >= 500)) throw problem;
        showProblem(this.parts.problem, problem);
      }
      await new Promise((wake) => { setTimeout(wake, RETRY_SECONDS * 1000); });
    }
  }

  take(kind, data, signal) {
    if (kind === "log") this.addLog(data.line);
    else if (kind === "metric") this.addMetric(data);
    else if (kind === "progress") this.show({ ...this.job, progress: data });
    else if (kind === "state") {
      this.onChange();
      // Old states come again when a job is opened: what it is now is asked for once they have all come.
      this.asked ??= setTimeout(async () => {
        this.asked = undefined;
        try {
          this.show(await getJson(this.path(""), signal));
          await this.showArtefacts(signal);
        } catch (problem) {
          if (!signal.aborted) showProblem(this.parts.problem, problem);
        }
      }, 100);
    }
  }

  addLog(line) {
    const { log } = this.parts;
    const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    log.append(`${line}\n`);
    while (log.childNodes.length > LOG_LINES) log.firstChild.remove();
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  addMetric(metric) {
    if (metric.kind !== "train" && metric.kind !== "eval") return;
    if (!this.charts.has(metric.stage)) {
      const chart = new LossChart(metric.stage);
      this.charts.set(metric.stage, chart);
      this.parts.charts.append(chart.figure);
    }
    this.charts.get(metric.stage).add(metric);
  }

  addressOf(path) {
    return this.path(`/artefacts/${path.split("/").map(encodeURIComponent).join("/")}`);
  }

  /** A finished job that has written texts opens on them, its log folded away. */
  async showTexts(artefacts) {
    const file = this.job.state === "succeeded" ? textsFile(this.job.outcomes, artefacts) : null;
    if (!file || this.shownTexts === this.id) return;
    this.shownTexts = this.id;
    this.parts.texts.replaceChildren(await showTexts(file, this.addressOf(file.path)));
    if (!this.parts.log.hasChildNodes()) this.parts.logFold.open = false;  // nobody reads it yet
  }

  async showArtefacts(signal) {
    const { artefacts } = await getJson(this.path("/artefacts"), signal);
    await this.showTexts(artefacts);
    const rows = artefacts.map(({ path, size }) => {
      const address = this.addressOf(path);
      const link = make("a", { href: address, textContent: path, download: path.split("/").at(-1) });
      link.addEventListener("click", (event) => { if (getKey()) { event.preventDefault(); this.download(address, link.download); } });
      return make("li", {}, link, make("span", { className: "note", textContent: ` ${fileSize(size)}` }));
    });
    this.parts.artefacts.replaceChildren(...(rows.length ? rows : [make("li", { className: "note", textContent: "none yet" })]));
  }

  /** A link sends no key: with one the file is fetched, then saved. */
  async download(address, name) {
    try {
      const url = URL.createObjectURL(await getBlob(address));
      make("a", { href: url, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    } catch (problem) {
      showProblem(this.parts.problem, problem);
    }
  }
}
