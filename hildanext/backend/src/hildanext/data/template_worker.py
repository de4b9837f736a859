"""The program in which chat templates are rendered: a line of JSON asks for a conversation's text, a line answers.

A template comes with a stranger's model: jinja's sandbox keeps it from the machine, this program from its time and
memory. It is started as a file by `template_rendering.py` and imports nothing of this package.
"""

import json
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, ext, nodes, sandbox, utils
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser

MEMORY_BYTES = 512 << 20
"""Of addresses, where the system can limit them (Linux)."""
LONGEST_TEXT = 1 << 24
"""Characters that a template may add to its conversation's own."""
FAULTS = (
    TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, AssertionError, SyntaxError,
    RuntimeError,
)  # fmt: skip
"""What a template can raise that is no lack of anything."""


class Generation(ext.Extension):
    """`{% generation %}` marks what an assistant says; here it is only its text."""

    tags = {"generation"}  # noqa: RUF012 (as jinja has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(utils.Namespace):
    """Without names that begin with an underscore, by which a sandbox was left before."""

    def __init__(*args: Any, **fields: Any) -> None:
        values = dict(*args[1:], **fields)
        for name in values:
            _check_name(name)
        utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace with {name!r}")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def make_environment() -> sandbox.ImmutableSandboxedEnvironment:
    """As Transformers renders templates."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *args, **fields: dict(*args, **fields),
        "namespace": Namespace,
    }
    return environment


def answer(compile_text: Callable[[str], Template], question: dict[str, Any]) -> dict[str, str]:
    """`text`, or why there is none: `refused` by the template or its fault, `exceeded` a limit."""
    try:
        text = compile_text(question["template"]).render(**question["fields"])
    except MemoryError:
        return {"exceeded": f"more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        return {"exceeded": "more depth than there is"}
    except FAULTS as problem:
        name = "" if isinstance(problem, TemplateError) else f"{type(problem).__name__}: "
        return {"refused": (name + " ".join(str(problem).split()))[:200]}
    if len(text) > LONGEST_TEXT + question["length"]:
        return {"exceeded": f"{len(text)} characters"}
    return {"text": text}


def main() -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    compile_text = lru_cache(maxsize=8)(make_environment().from_string)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(compile_text, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
