"""The web service: a model behind REST, OpenAI's protocol and a page.

hildanext serve
hildanext serve --config hildanext/runs/configs/default.json
hildanext serve --model runs/sft/checkpoint --parent smollm2-135m --port 9000 --api-key-env HILDA_API_KEY --host 0.0.0.0
"""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hildanext.commands import RUNTIME_FLAGS, add_run_flags, add_runtime_flags, load_run
from hildanext.core.errors import ConfigError
from hildanext.core.logging_setup import configure_logging
from hildanext.stages import STAGES

if TYPE_CHECKING:
    from hildanext.engine.base import Engine
    from hildanext.recipe import RunConfig
    from hildanext.serve.service import Service
    from hildanext.serve.settings import ServeConfig

EMBEDDED: Mapping[str, Any] = {"model": "tiny", "parent": "tiny", "chat_template": "plain"}
"""What is served where nothing is named: the embedded pair."""

FLAGS = ("host", "port", "model", "parent", "api_key_env", "jobs_folder")


def configure(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser)
    parser.add_argument("--host", help="address to listen at (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, help="default 8000; 0 takes any free one")
    parser.add_argument("--engine", metavar="NAME", help="auto (default), or one of the engines; see hildanext doctor")
    parser.add_argument("--model", help="diffusion checkpoint: a folder, or tiny")
    parser.add_argument("--parent", help="autoregressive model that answers beside it; none for no parent")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable that holds the key clients must send"
    )
    parser.add_argument("--jobs-folder", metavar="FOLDER", help="where jobs live (default runs/jobs); none for no jobs")
    add_runtime_flags(parser)


def run(options: argparse.Namespace) -> int:
    from hildanext.api import create_app, read_key
    from hildanext.serve.server import address_of, bind, configure_access_log, serve
    from hildanext.stages.submission import open_jobs

    settings = settings_of(options)
    read_key(settings)  # what is wrong with it is known before a model is loaded
    configure_logging("info")
    configure_access_log()
    bound = bind(settings)
    with bound:
        engine = _open_engine(settings)
        jobs = open_jobs(settings.jobs_folder, settings.job_limit) if settings.jobs_folder is not None else None
        app = create_app(settings, engine, jobs)
        serve(app, bound, lambda: print(startup_line(address_of(bound), app.state.service), flush=True))
        if jobs is not None:
            jobs.close()
    return 0


def settings_of(options: argparse.Namespace) -> "ServeConfig":
    """The section `serve` of --config, --set and the flags. Raises `ConfigError`.

    A configuration without that section is an error, and so is a model of one's own with the embedded one's parent.
    """
    from hildanext.core.config import validate
    from hildanext.serve.settings import ServeConfig

    run = load_run(options)
    if options.config is not None and "serve" not in run:
        raise ConfigError(f"{options.config!r} has no section 'serve'", 'give it one: {"serve": {"model": ...}}')
    chosen = chosen_section(run, options, EMBEDDED)
    chosen |= {name: getattr(options, name) for name in FLAGS if getattr(options, name) is not None}
    for name in ("parent", "jobs_folder"):
        if chosen.get(name) == "none":
            chosen[name] = None
    return validate(ServeConfig, chosen, where="section serve")


def chosen_section(run: Mapping[str, Any], options: argparse.Namespace, embedded: Mapping[str, Any]) -> dict[str, Any]:
    """The section `serve` over the run's own keys, with the flags of model and engine in it; `embedded` where nobody
    names a model. Raises `ConfigError`."""
    from hildanext.recipe import read_shared, section_of

    shared, section = read_shared(run, STAGES), section_of(run, "serve")
    named = options.model is not None or options.parent is not None or {"model", "parent"} & set(section)
    beside = {"parent": shared.parent} if shared.parent is not None else {}
    chosen = {"profile": shared.profile, **(beside if named else embedded), **section}
    if options.model is not None and options.model != section.get("model"):
        chosen |= {"model": options.model, "parent": None}  # what the file names as its parent is another model's
    engine = dict(section_of({"engine": {"name": "auto"}, **chosen}, "engine"))
    if getattr(options, "engine", None) is not None and options.engine != engine.get("name"):
        engine = {"name": options.engine}
    given = {name: getattr(options, name) for name in RUNTIME_FLAGS if getattr(options, name) is not None}
    return {**chosen, "engine": {**_runtime(shared, engine), **engine, **given}}


def _runtime(shared: "RunConfig", engine: Mapping[str, Any]) -> dict[str, Any]:
    """What a run says that an engine is to run on, as far as it is one's own machine."""
    from hildanext.engine import engine_class

    name = engine.get("name", "auto")
    knobs = vars(engine_class("local" if name == "auto" else name)).get("__dataclass_fields__", {})
    named = {name: getattr(shared, name) for name in RUNTIME_FLAGS if "base_url" not in engine and name in knobs}
    return {name: value for name, value in named.items() if value not in (None, "auto")}


def _open_engine(settings: "ServeConfig") -> "Engine":
    """Raises `UnknownChoice`, `ConfigError`, and what opening a model raises."""
    from hildanext.data.chat_template import set_template
    from hildanext.engine import open_engine
    from hildanext.engine.local import LocalEngine

    engine = open_engine(settings.engine, settings.model, settings.parent)
    if settings.chat_template == "plain" and isinstance(engine, LocalEngine):
        set_template(engine.tokenizer, "auto")
    return engine


def startup_line(address: str, service: "Service") -> str:
    """What is served where, with the names under which requests ask for it; all else that is said goes to stderr."""
    facts, settings = service.engine.facts, service.settings
    beside = f" beside its parent {service.parent}" if service.parent is not None else ""
    threads = f", {facts.threads} thread{'s' * (facts.threads != 1)}" if facts.threads is not None else ""
    jobs = f"; jobs in {settings.jobs_folder}" if settings.jobs_folder is not None else "; no jobs"
    key = "; a key is asked for" if settings.api_key_env is not None else ""
    return (
        f"{address} serves {service.model}{beside} with {facts.engine} ({facts.reason}) "
        f"on {facts.device}, {facts.dtype}{threads}{jobs}{key}"
    )
