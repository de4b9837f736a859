"""A chat template's text of a conversation, from a program that is killed where the template never ends."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hildanext.core.errors import ModelError
from hildanext.core.line_program import LineProgram

WORKER = Path(__file__).with_name("template_worker.py")
START_SECONDS = 60.0
RENDER_SECONDS = 10.0
"""A usual conversation takes less than a millisecond of them."""
OTHER_TEMPLATE = "the template comes with the model: use a tokenizer with another, or chat.template 'plain'"

_program = LineProgram(WORKER, START_SECONDS)


class TemplateRefused(Exception):
    """The template raises for this conversation, or cannot be compiled."""


class TemplateFailed(ModelError):
    """The template takes more than it may."""

    status = 500


def render_template(template: str, fields: Mapping[str, Any], seconds: float = RENDER_SECONDS) -> str:
    """The text. `fields` are plain JSON values: the messages, and what else the template reads.

    Raises `TemplateRefused`, and `TemplateFailed` for a template that takes too long, too much memory or too much
    text.
    """
    plain = json.dumps(fields, default=str)
    question = f'{{"template": {json.dumps(template)}, "length": {len(plain)}, "fields": {plain}}}'
    begun = time.monotonic()
    try:
        line = _program.ask(question, seconds)
    except OSError as problem:
        raise TemplateFailed(f"chat templates cannot be rendered ({problem})", "reinstall jinja2") from None
    if line is None:
        late = time.monotonic() - begun >= seconds
        why = f"takes more than {seconds:g} s" if late else "ends the program that renders it"
        raise TemplateFailed(f"the chat template {why}", OTHER_TEMPLATE)
    answer = json.loads(line)
    if "exceeded" in answer:
        raise TemplateFailed(f"the chat template takes {answer['exceeded']}", OTHER_TEMPLATE)
    if "refused" in answer:
        raise TemplateRefused(answer["refused"])
    return str(answer["text"])
