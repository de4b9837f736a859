"""One self-contained page about a run: what was done, the curves, the numbers, the samples, how it was measured.

Everything is read from the run's folder; what a run did not do is left out of its page.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hildanext.core import plots
from hildanext.core.errors import DataError
from hildanext.core.json_text import BadJson, parse
from hildanext.core.metrics_log import run_metrics
from hildanext.core.run_dir import RUN_FILE, write_atomically
from hildanext.core.statistics import wilson
from hildanext.eval import task_tables
from hildanext.eval.evaluation import GENERATION_COLUMNS, LIKELIHOOD_COLUMNS, generation_cells, likelihood_cells
from hildanext.eval.generation import PARENT, label
from hildanext.report import trace_html

REPORT = "report.html"

EDIT_STORM = 1.0
"""Edits for each token written; above it the page remarks on them, for then a token was rewritten more than once."""

CSS = """
:root{--ink:#1f2328;--dim:#636c76;--line:#d8dee4;--ground:#ffffff;--card:#f6f8fa;--link:#0969da;LIGHT}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--dim:#8d96a0;--line:#30363d;--ground:#0d1117;--card:#161b22;
 --link:#58a6ff;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--ground);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;margin:.5rem 0 0} h2{font-size:1.2rem;margin:2.2rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .3rem} .dim,figcaption{color:var(--dim);font-size:.88rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left} th{color:var(--dim);font-weight:600}
figure{margin:1rem 0} img{max-width:100%;height:auto;background:#fff;border-radius:8px;border:1px solid var(--line)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0;padding:0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
.facts b{display:block;font-size:1.35rem} .facts span{color:var(--dim);font-size:.82rem}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem;overflow-x:auto;font-size:.8rem}
details{margin:.5rem 0} summary{cursor:pointer;color:var(--link)}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr));gap:0 .8rem}
.beside .sample{min-width:0} .sample h3{margin-top:0} .remark{border-left:4px solid var(--edit);padding-left:.6rem}
.sample p{white-space:pre-wrap}
.sample{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem .9rem;margin:.7rem 0}
"""

CAPTIONS = {
    "loss": "Training loss (nats per maskable token) with the phases shaded and the block size as steps. Losses at "
    "different block sizes are different problems: a larger block is a harder one. Points are the held-out bound.",
    "losses": "The parts of the loss with their weights; their heights are not comparable with each other.",
    "drafts": "A parent that stays: the loss of each place of a group of masks, and below it the tokens that a forward "
    "gives on held-out text when drafts stand behind every token (1 + the drafts that the parent keeps).",
    "masked_accuracy": "Share of masked tokens whose most likely prediction was right, by noise level t.",
    "held_out": "On held-out rows: masked tokens whose most likely prediction was right; of random wrong tokens among "
    "right ones, those that a forward with tau_edit 0 would mend; of the right ones, those that it would leave alone.",
    "learning_rate": "The learning rate has its own schedule, apart from the block sizes.",
    "throughput": "Data tokens per second; each is fed more than once where a noisy and a clean copy are needed.",
    "reward": "What answers earn while the policy learns (means of a round, and smoothed), and below what is right: of "
    "sampled answers to problems that are trained on, and of greedy ones to held-out problems, with 95 % intervals. "
    "Sampled accuracy rises to the greedy one by mere sharpening; the held-out greedy curve and pass@k say more.",
    "policy": "Entropy of the laws that tokens were drawn from, and below it the groups whose answers all earn the "
    "same, which teach nothing, the different texts in a group, and the answers that ended by themselves.",
    "answers": "Tokens of an answer, and tokens per forward, sampled and on held-out problems.",
    "distance": "The gradient's norm before it is clipped; the KL to the reference, and what clipping took, where the "
    "objective has them.",
    "time_split": "Seconds of a step: writing answers, judging them, what old policy and reference say, the update.",
    "likelihood": "Held-out likelihood. Exact numbers beside bounds: a bound's slack is part of its height.",
    "speed": "Tokens per second, one prompt at a time, all ways taking turns in one process.",
    "tasks": "Benchmark scores with 95 % intervals; every model was given the same prompts.",
    "perplexity": "Perplexity of held-out texts with 95 % intervals. A bound is not an exact number.",
    "lengths": "How long answers were, in tokens. A model that stops early or never shows here first.",
    "quality": "Perplexity of what was written, under the AR parent. Repetitive text scores well here.",
}


def write_report(
    folder: str | Path, outcomes: Mapping[str, Mapping[str, Any]], title: str, into: str | Path | None = None
) -> Path:
    """Write `report.html` into the run's folder (or `into` another) from what its stages returned, and return its path.

    `outcomes` may name `run` (a training folder), `results` (an `eval.json`), `samples` and token counts.
    Raises `DataError` where a file they name is missing or broken.
    """
    folder = Path(folder)
    results: dict[str, Any] = {}
    for outcome in outcomes.values():
        results.update(outcome)
    record = _json(folder / RUN_FILE) if (folder / RUN_FILE).exists() else {}
    evaluation = _json(results["results"]) if "results" in results else {}
    samples = _json(results["samples"]) if "samples" in results else {}
    metrics = run_metrics(results["run"]) if "run" in results else []
    parts = [
        _head(title, record, evaluation),
        _facts(results, metrics, evaluation),
        _conversion(results, metrics),
        _fine_tuning(results),
        alignment(results),
        _likelihood(results, evaluation, record),
        _writing(results, evaluation),
        _tasks(results),
        _samples(samples),
        _how(record, evaluation),
    ]
    page = _page(title, "\n".join(part for part in parts if part))
    path = Path(into if into is not None else folder) / REPORT
    write_atomically(path, page)
    return path


def _page(title: str, body: str) -> str:
    css = CSS.replace("LIGHT", trace_html.LIGHT).replace("DARK", trace_html.DARK) + trace_html.CSS
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{css}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _head(title: str, record: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    card = evaluation.get("card", {})
    parent = escape(str(card.get("parent") or record.get("config", {}).get("parent", "")))
    keeps = record.get("config", {}).get("convert", {}).get("keep_parent")
    became = (
        "stays as it is and got adapters that draft for it" if keeps else "became an editable diffusion language model"
    )
    origin = f"The autoregressive model <b>{parent}</b> {became}. " if parent else ""
    alignment = "parent" if card.get("shift") == "left" else "block"
    how = f"Alignment {alignment}, block size {card['block_size']}. " if card else ""
    version = escape(str(record.get("hildanext", "")))
    return f'<h1>{escape(title)}</h1><p class="dim">{origin}{how}hildanext {version}</p>'


def _facts(results: Mapping[str, Any], metrics: plots.Metrics, evaluation: Mapping[str, Any]) -> str:
    cards: list[tuple[str, str]] = []
    training = [line for line in metrics if line.get("kind") == "train"]
    if training:
        cards.append((f"{int(training[-1]['tokens']):,}", "data tokens trained"))
        cards.append((_duration(sum(float(line.get("seconds", 0.0)) for line in training)), "of training"))
    for row in evaluation.get("likelihood", []):
        over = row.get("percent_over_parent")
        more = f" ({over:+.0f} % over the parent)" if over is not None and row["name"] != PARENT else ""
        cards.append((f"{row['nats_per_token']:.2f}", f"nats/token, {row['name']}, {row['kind']}{more}"))
    for row in evaluation.get("generation", []):
        cards.append((f"{row['tokens_per_second']:.0f}", f"tokens/s, {label(row['name'])}"))
    tiles = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in cards)
    return f'<div class="facts">{tiles}</div>' if tiles else ""


def _conversion(results: Mapping[str, Any], metrics: plots.Metrics) -> str:
    if "run" not in results:
        return ""
    files = [Path(results["run"]) / "plots" / f"{name}.png" for name in CAPTIONS]
    pictures = "".join(_figure(file) for file in files if file.exists())
    phases = _phases(metrics)
    return f"<h2>Conversion</h2>{phases}{pictures}"


def _fine_tuning(results: Mapping[str, Any]) -> str:
    """What was measured before, at the best checkpoint and at the end; the curves; the last answers."""
    if "sft_run" not in results:
        return ""
    summary, folder = results.get("sft", {}), Path(results["sft_run"])
    shown = (("bound", 1, ".3f"), ("masked_accuracy", 100, ".1f"), ("corrected", 100, ".1f"), ("kept", 100, ".1f"))
    rows = [
        [
            name,
            f"{line['step']:,}",
            *(f"{factor * float(line.get(field) or 0):{form}}" for field, factor, form in shown),
        ]
        for name in ("before", "best", "last")
        if (line := summary.get(name)) is not None
    ]
    columns = ("", "step", "bound, nats/token", "masks right, %", "wrong tokens mended, %", "right ones kept, %")
    early = " It was stopped early: nothing better came." if summary.get("stopped_early") else ""
    size = (
        f"<p>{summary['data']['train']['examples']:,} conversations, {summary['data']['valid']['examples']:,} held out"
    )
    size = f"{size}; {summary['tokens']:,} tokens in {summary['step']:,} steps.{early}</p>" if "data" in summary else ""
    pictures = "".join(_figure(file) for name in CAPTIONS if (file := folder / "plots" / f"{name}.png").exists())
    samples = [line for line in run_metrics(folder) if line.get("kind") == "sample"]
    last = "".join(_answer(line) for line in samples if line["step"] == samples[-1]["step"])
    return f"<h2>Fine-tuning</h2>{size}{_table(columns, rows) if rows else ''}{pictures}{last}"


def alignment(results: Mapping[str, Any]) -> str:
    """What could be done before, at the best checkpoint and at the end; alarms, curves, the last answers."""
    if "rl_run" not in results:
        return ""
    summary, folder = results.get("rl", {}), Path(results["rl_run"])
    metrics = run_metrics(folder)
    measured = [(name, summary[name]) for name in ("before", "best", "last") if summary.get(name) is not None]
    table = _table(*measured_table(measured)) if measured else ""
    note = '<p class="dim">In brackets Wilson\'s 95 % interval over problems.</p>' if measured else ""
    words = "".join(
        f'<p class="remark">Alarm <b>{escape(str(line["alarm"]))}</b>, step {line["step"]:,}: '
        f"{escape(str(line['words']))}</p>"
        for line in metrics
        if line.get("kind") == "alarm"
    )
    alarms = words or '<p class="dim">No alarm was raised.</p>'
    pictures = "".join(_figure(file) for name in CAPTIONS if (file := folder / "plots" / f"{name}.png").exists())
    samples = [line for line in metrics if line.get("kind") == "sample"]
    last = [line for line in samples if line["step"] == samples[-1]["step"]]
    cards = "".join(_rewarded(line) for line in last)
    shown = f"<h3>Best and worst answers of the last round that was shown</h3>{cards}" if cards else ""
    return f"<h2>Alignment</h2>{table}{note}{alarms}{pictures}{shown}"


def measured_table(measured: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what evaluations found; a column that none has is left out."""
    passes = sorted({name for _, line in measured for name in line if name.startswith("pass_at_")})
    shares = {"accuracy": "greedy, %", "sampled_accuracy": "sampled, %"}
    shares |= {name: f"pass@{name.removeprefix('pass_at_')}, %" for name in passes}
    fields = [name for name in shares if any(line.get(name) is not None for _, line in measured)]
    columns = ["", "step", *(shares[name] for name in fields), "reward", "tokens", "tokens per forward", "ended, %"]
    rows = []
    for name, line in measured:
        count = len(line.get("right") or "")
        cells = [_with_interval(line.get(field), count) for field in fields]
        numbers = [(line.get("reward"), ".3f", 1), (line.get("length"), ".1f", 1)]
        numbers += [(line.get("tokens_per_forward"), ".2f", 1), (line.get("ended"), ".0f", 100)]
        more = ["-" if value is None else format(times * value, form) for value, form, times in numbers]
        rows.append([name, f"{line['step']:,}", *cells, *more])
    return columns, rows


def _with_interval(share: float | None, count: int) -> str:
    if share is None:
        return "-"
    if count == 0:
        return f"{100 * share:.1f}"
    low, high = wilson(round(share * count), count)
    return f"{100 * share:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def _rewarded(line: Mapping[str, Any]) -> str:
    """A sampled answer with what it earned."""
    reward = "not judged" if line.get("reward") is None else f"reward {line['reward']:g}"
    earned = f"{reward}, advantage {line.get('advantage', 0):+.3f}, step {line['step']}"
    parts = "".join(f"<p><b>{name}</b><br>{escape(str(line.get(name, '')))}</p>" for name in ("problem", "answer"))
    return f'<div class="sample">{parts}<p class="dim">{escape(earned)}</p></div>'


def _answer(line: Mapping[str, Any]) -> str:
    """A sample that was taken while training."""
    parts = "".join(f"<p><b>{name}</b><br>{escape(str(line[name]))}</p>" for name in ("prompt", "answer", "wanted"))
    spent = f"{line['tokens']} tokens in {line['forwards']} forwards, step {line['step']}"
    return f'<div class="sample">{parts}<p class="dim">{escape(spent)}</p></div>'


def _phases(metrics: plots.Metrics) -> str:
    """A line for each stretch of one phase and block size."""
    rows: list[list[Any]] = []
    before = 0
    for line in (line for line in metrics if line.get("kind") == "train"):
        key = [line["phase"], line["block_size"]]
        tokens = int(line["tokens"]) - before
        before = int(line["tokens"])
        if rows and rows[-1][:2] == key:
            rows[-1][2] += tokens
            rows[-1][3] += 1
            rows[-1][4] = float(line["loss"])
        else:
            rows.append([*key, tokens, 1, float(line["loss"])])
    cells = [[str(p), str(b), f"{tokens:,}", str(steps), f"{loss:.3f}"] for p, b, tokens, steps, loss in rows]
    return _table(("phase", "block size", "data tokens", "steps", "last loss"), cells) if cells else ""


def _likelihood(results: Mapping[str, Any], evaluation: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    rows = evaluation.get("likelihood", [])
    if not rows:
        return ""
    table = _table(LIKELIHOOD_COLUMNS, [likelihood_cells(row) for row in rows])
    source = record.get("config", {}).get("prepare", {}).get("valid", {}).get("source", {})
    drawn = ""
    if source.get("name") == "parent" and source.get("temperature", 1.0) == 1.0 and source.get("top_p", 1.0) == 1.0:
        cut = source.get("max_tokens", "max_tokens")
        drawn = (
            '<p class="dim">The text was sampled from the AR parent itself, so the parent\'s number estimates the '
            "exact entropy of the data: no model can do better on average, and the distance to it is the cost of "
            f"converting. (A document cut at {cut} tokens ends in an EOS that the parent did not choose.)</p>"
        )
    return (
        f"<h2>Likelihood of {rows[0]['tokens']:,} held-out tokens</h2>{table}{drawn}"
        f"{_named_picture(results, 'likelihood')}{_notes(evaluation, (0, 1))}"
    )


def _writing(results: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    rows = evaluation.get("generation", [])
    if not rows:
        return ""
    table = _table(GENERATION_COLUMNS, [generation_cells(_with_nan(row)) for row in rows])
    storms = [(row["name"], edit_storm(int(row["tokens"]), int(row["edits"]))) for row in rows]
    sentences = [*verdicts_of(rows), *(f"{label(name)}: {storm}" for name, storm in storms if storm)]
    verdicts = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    pictures = _named_picture(results, "speed") + _named_picture(results, "quality")
    count = len(evaluation.get("prompts", []))
    return (
        f"<h2>Writing: speed and quality</h2><p>{count} held-out beginnings, one at a time.</p>{table}"
        f"<ul>{verdicts}</ul>{pictures}{_notes(evaluation, (2,))}"
    )


def _tasks(results: Mapping[str, Any]) -> str:
    """Benchmark tasks, where the run has any: scores, what they were measured with, how long answers were."""
    if "tasks" not in results:
        return ""
    result = _json(results["tasks"])
    table = _table(task_tables.COLUMNS, [cells for task in result["tasks"] for cells in task_tables.cells_of(task)])
    notes = "".join(f'<p class="dim">{escape(line)}</p>' for line in task_tables.lines(result))
    pictures = "".join(_named_picture(results, name) for name in ("tasks", "perplexity", "lengths"))
    return f"<h2>Tasks</h2>{table}{pictures}<details><summary>How each was measured</summary>{notes}</details>"


def verdicts_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers say of each way beside the parent, whichever way they fall."""
    parent = next((row for row in rows if row["name"] == PARENT), None)
    if parent is None or not parent["tokens_per_second"]:
        return []
    verdicts = []
    for row in rows:
        if row is parent:
            continue
        ratio = row["tokens_per_second"] / parent["tokens_per_second"]
        pace = f"{ratio:.1f} times as fast as" if ratio >= 1 else f"slower than ({ratio:.2f} times the speed of)"
        rate = f"{row['tokens_per_forward']:.2f} tokens per forward"
        sentence = f"{label(row['name'])} wrote {rate}, {pace} the AR parent"
        ours, theirs = row.get("generative_perplexity"), parent.get("generative_perplexity")
        if ours is not None and theirs is not None:
            sentence += f"; its perplexity under the parent is {ours:.1f}, the parent's own {theirs:.1f}"
        verdicts.append(f"{sentence}.")
    return verdicts


def _samples(record: Mapping[str, Any]) -> str:
    """The texts of each prompt side by side: the model's in every mode, and the parent's."""
    samples: Sequence[Mapping[str, Any]] = record.get("samples", [])
    if not samples:
        return ""
    groups: dict[str, list[str]] = {}
    for sample in samples:
        groups.setdefault(sample["prompt"], []).append(_sample(sample))
    missing = record.get("without_parent")
    without = f'<p class="dim">The AR parent is not beside them: {escape(missing)}.</p>' if missing else ""
    shown = "".join(f'<div class="beside">{"".join(cards)}</div>' for cards in groups.values())
    return f"<h2>Samples</h2>{without}{shown}"


def _sample(sample: Mapping[str, Any]) -> str:
    steps, prompt = sample.get("trace", {}).get("steps", []), sample.get("prompt_cells", [sample["prompt"]])
    is_parent = sample["way"] == PARENT
    edits = "" if is_parent else f"{sample['edits']} edits, "
    numbers = (
        f"{sample['tokens']} tokens in {sample['forwards']} forwards ({sample['tokens_per_forward']:.2f} each), "
        f"{sample['tokens_per_second']:.0f} tokens/s, {edits}ended by {sample['finish_reason']}"
    )
    if steps:
        text = trace_html.final_text(steps, prompt, sample["tokens"])
        more = f"<details><summary>Step by step ({len(steps)} forwards)</summary>"
        text += f"{more}{trace_html.step_by_step(steps, prompt)}</details>"
    else:
        text = f'<div class="trace"><span class="p">{escape(sample["prompt"])}</span>{escape(sample["text"])}</div>'
    head = f"<h3>{escape(label(sample['way']))}{', greedy' if is_parent else ''}</h3>"
    storm = edit_storm(int(sample["tokens"]), int(sample["edits"]))
    remark = f'<p class="remark">{escape(storm)}</p>' if storm else ""
    return f'<div class="sample">{head}{text}<p class="dim">{escape(numbers)}</p>{remark}</div>'


def edit_storm(tokens: int, edits: int) -> str:
    """A remark on a text, or on several, whose tokens were rewritten over and over; "" where they were not."""
    if edits <= EDIT_STORM * max(tokens, 1):
        return ""
    return (
        f"An edit storm: {edits:,} edits for {tokens:,} tokens, more than {EDIT_STORM:g} a token. The model does not "
        "settle. A higher tau_edit edits only where it is surer, a lower max_post ends a block sooner."
    )


def _how(record: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    machine = evaluation.get("machine", {})
    versions = {**record.get("versions", {}), **machine.get("versions", {})}
    shown = ("device", "device_name", "dtype", "threads", "cores", "cpu_flags")
    facts = {key: machine[key] for key in shown if key in machine}
    rows = [[key, ", ".join(value) if isinstance(value, list) else str(value)] for key, value in facts.items()]
    rows += [[name, str(version)] for name, version in versions.items() if version]
    table = f"<h3>Machine and versions</h3>{_table(('', ''), rows)}" if rows else ""
    config = json.dumps(record.get("config", {}), indent=2)
    settings = json.dumps(evaluation.get("settings", {}), indent=2)
    which = f"seed {record.get('seed')}, profile {record.get('profile')}"
    folds = f"<details><summary>Configuration of the run ({which})</summary><pre>{escape(config)}</pre></details>"
    if evaluation:
        folds += f"<details><summary>Settings of the evaluation</summary><pre>{escape(settings)}</pre></details>"
    return f"<h2>How it was measured</h2>{table}{folds}"


def _notes(evaluation: Mapping[str, Any], which: Sequence[int]) -> str:
    notes = evaluation.get("notes", [])
    return "".join(f'<p class="dim">{escape(notes[index])}</p>' for index in which if index < len(notes))


def _named_picture(results: Mapping[str, Any], name: str) -> str:
    files = [Path(file) for file in results.get("pictures", [])]
    return "".join(_figure(file) for file in files if file.stem == name and file.exists())


def _figure(file: Path) -> str:
    caption = CAPTIONS.get(file.stem, file.stem)
    image = f'<img alt="{escape(caption)}" src="{plots.data_uri(file)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _with_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row read from JSON, where a missing number is null."""
    return {key: float("nan") if value is None else value for key, value in row.items()}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _json(path: str | Path) -> dict[str, Any]:
    try:
        value = parse(Path(path).read_bytes(), allow_nan=True, allow_duplicates=True)
    except (OSError, BadJson) as problem:
        raise DataError(f"cannot read {str(path)!r} ({problem})", "run the stage that writes it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{str(path)!r} holds {type(value).__name__}", "run the stage that writes it again")
    return value
