"""Background jobs: any stage of a recipe, each in a process of its own, in a table that survives.

hildanext jobs work
hildanext jobs submit convert --config run.json --set convert.block_size=8
hildanext jobs submit generate --set generate.model=tiny --set generate.prompts_file=prompts.txt
hildanext jobs events 0001-convert --follow
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hildanext.commands import add_run_flags, load_run, print_json
from hildanext.core.errors import ConfigError
from hildanext.core.logging_setup import configure_logging

if TYPE_CHECKING:
    from hildanext.jobs.base import Job, JobEvent
    from hildanext.jobs.service import JobService

EPILOG = """what there is:
  submit KIND     queue a stage (its sections from --config and --set), or `run`: a whole recipe
  list            jobs, the newest first
  show ID         one job: state, progress, what its stages made
  cancel ID       stop it; a training saves first
  events ID       what happened to it; with --follow as it happens
  log ID          what its process printed
  artefacts ID    the files in its folder
  work            take queued jobs until Ctrl-C; jobs that run then go on
"""

FOLDER = "runs/jobs"
"""As `submission.FOLDER`, which is not imported to print help."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--folder", default=FOLDER, help=f"where the jobs live (default {FOLDER})")
    shared.add_argument("--json", action="store_true", help="print JSON and nothing else")
    rows = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    submit = rows.add_parser("submit", parents=[shared], help="queue a stage or a recipe")
    submit.add_argument("kind", metavar="KIND", help="a stage's name, or run")
    add_run_flags(submit)
    listing = rows.add_parser("list", parents=[shared], help="jobs, the newest first")
    listing.add_argument("--state", help="only those in this state")
    listing.add_argument("--limit", type=int, default=50)
    listing.add_argument("--before", metavar="ID", help="go on below this one")
    for action in ("show", "cancel", "log", "artefacts", "events"):
        row = rows.add_parser(action, parents=[shared])
        row.add_argument("id", metavar="ID")
        if action == "events":
            row.add_argument("--follow", action="store_true", help="wait for more until the job has ended")
            row.add_argument("--after", type=int, default=0, metavar="EVENT", help="only those after this event's id")
    work = rows.add_parser("work", parents=[shared], help="take queued jobs until Ctrl-C")
    work.add_argument("--limit", type=int, default=1, help="jobs that run at a time (default 1)")


def run(options: argparse.Namespace) -> int:
    from hildanext.stages.submission import open_jobs

    limit = options.limit if options.action == "work" else 1
    if limit < 1:
        raise ConfigError(f"--limit {limit}", "at least one job runs at a time")
    with open_jobs(options.folder, limit) as service:
        actions = {
            "submit": _submit,
            "list": _list,
            "show": _show,
            "cancel": _cancel,
            "events": _events,
            "log": _log,
            "artefacts": _artefacts,
            "work": _work,
        }
        actions[options.action](service, options)
    return 0


def _submit(service: "JobService", options: argparse.Namespace) -> None:
    job = service.submit(options.kind, load_run(options))
    if options.json:
        print_json(job.as_json())
        return
    print(f"queued {job.id} in {job.folder}")
    if not service.supervised():
        print(f"nothing takes jobs there yet: hildanext jobs work --folder {options.folder}", file=sys.stderr)


def _list(service: "JobService", options: argparse.Namespace) -> None:
    jobs = service.list(options.limit, options.before, options.state)
    if options.json:
        print_json([job.as_json() for job in jobs])
        return
    from rich.table import Table
    from rich.text import Text

    from hildanext.core.console import wide_console

    table = Table("job", "state", "created", "progress", "error", box=None)
    for job in jobs:
        error = job.error or ""
        table.add_row(job.id, _state(job), _time(job.created), progress_line(job.progress.as_json()), Text(error[:80]))
    wide_console().print(table if jobs else f"no jobs in {options.folder}")


def _show(service: "JobService", options: argparse.Namespace) -> None:
    job = service.get(options.id)
    outcomes = service.outcomes(options.id)
    if options.json:
        print_json({**job.as_json(), "outcomes": outcomes})
        return
    rows: dict[str, Any] = {
        "job": job.id,
        "state": _state(job),
        "progress": progress_line(job.progress.as_json()),
        "error": job.error,
        "created": _time(job.created),
        "started": _time(job.started),
        "ended": _time(job.ended),
        "attempts": job.attempts or None,
        "exit code": job.exit_code,
        "process": job.pid,
        "folder": job.folder,
    }
    for key, outcome in outcomes.items():
        if isinstance(outcome, Mapping):
            rows |= {f"{key}: {name}": value for name, value in outcome.items() if isinstance(value, str | int | float)}
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        if value is not None and value != "":
            print(f"{name:<{width}}  {value}")


def _cancel(service: "JobService", options: argparse.Namespace) -> None:
    job = service.cancel(options.id)
    sentence = f"{job.id} is cancelled" if job.state == "cancelled" else f"{job.id} is stopping; a training saves first"
    print(json.dumps(job.as_json()) if options.json else sentence)


def _events(service: "JobService", options: argparse.Namespace) -> None:
    events = service.follow(options.id, options.after) if options.follow else _all_events(service, options)
    for event in events:
        print(json.dumps(event.as_json()) if options.json else event_line(event), flush=True)


def _all_events(service: "JobService", options: argparse.Namespace) -> "list[JobEvent]":
    events: list[JobEvent] = []
    while page := service.events(options.id, events[-1].id if events else options.after):
        events += page
    return events


def _log(service: "JobService", options: argparse.Namespace) -> None:
    text = service.log(options.id, 1 << 20)
    print(json.dumps({"log": text}) if options.json else text, end="\n" if options.json else "")


def _artefacts(service: "JobService", options: argparse.Namespace) -> None:
    artefacts = service.artefacts(options.id)
    if options.json:
        print_json([artefact.as_json() for artefact in artefacts])
        return
    for artefact in artefacts:
        print(f"{artefact.size:>14,}  {_time(artefact.modified)}  {artefact.path}")


def _work(service: "JobService", options: argparse.Namespace) -> None:
    configure_logging("info")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts it in the background has Ctrl-C ignored
        signal.signal(number, signal.default_int_handler)
    service.start()
    print(
        f"taking jobs from {service.folder}, {options.limit} at a time; Ctrl-C ends this", file=sys.stderr, flush=True
    )
    try:
        while True:
            time.sleep(1.0)
    except KeyboardInterrupt:  # the usual end
        service.stop()
    running = [job.id for job in service.list(1000, state="running")]
    if running:
        print(f"still running: {', '.join(running)}; the same command watches them again", file=sys.stderr)


def _state(job: "Job") -> str:
    return "cancelling" if job.cancelling else job.state


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def progress_line(progress: Mapping[str, Any]) -> str:
    """Stage, how much of it, loss and time left, as far as they are known."""
    parts: list[str] = []
    if progress["stages"] > 1:
        parts.append(f"{progress['stages_done']}/{progress['stages']} stages")
    if progress["stage"] is not None and progress["stages_done"] < progress["stages"]:
        parts.append(progress["stage"])
    if progress["done"] is not None:
        whole = "" if progress["total"] is None else f"/{progress['total']:,}"
        parts.append(f"{progress['done']:,}{whole} {progress['unit']}")
    if progress["loss"] is not None:
        parts.append(f"loss {progress['loss']:.3f}")
    if progress["eta_seconds"]:
        parts.append(f"{progress['eta_seconds']:.0f} s left")
    return ", ".join(parts)


def event_line(event: "JobEvent") -> str:
    """One event for people."""
    data = event.data
    if event.kind == "log":
        text = data["line"]
    elif event.kind == "progress":
        text = progress_line(data)
    elif event.kind == "metric":
        numbers = {key: value for key, value in data.items() if isinstance(value, int | float)}
        shown = " ".join(f"{key} {value:.5g}" for key, value in numbers.items())
        text = f"{data['stage']} {data.get('kind', '')}: {shown}"
    else:
        text = "cancelling" if data.get("cancelling") else f"{data['state']} (attempt {data['attempt']})"
        text += f": {data['error']}" if data.get("error") else ""
    return f"{event.id:>6}  {datetime.fromtimestamp(event.time):%H:%M:%S}  {event.kind:<8}  {text}"
