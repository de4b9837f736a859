"""What a policy says of its own wrong answer, and where it would go on from: asked as a prompt, read as JSON."""

import re
from collections.abc import Mapping
from typing import Any

from hildanext.core.json_text import BadJson, parse
from hildanext.rl.plugins.verifiers import Fault

KEYS = (
    "trajectory_summary",
    "root_cause_analysis",
    "trajectory_outcome",
    "improvement_suggestion",
    "retry_from_step",
)
OUTCOMES = ("success", "success_but_inefficient", "failure")


def reflection_prompt(problem: str, answer: str) -> str:
    """Asks for a reflection on an answer, whose lines are its steps, numbered from 0."""
    steps = "\n".join(f"[{number}] {line}" for number, line in enumerate(answer.splitlines()))
    return (
        f"Problem:\n{problem}\n\nAn answer, step by step:\n{steps}\n\n"
        f"Judge the answer. Reply with one JSON object with the keys {', '.join(KEYS)}. trajectory_outcome is one of "
        f"{', '.join(OUTCOMES)}; retry_from_step is the number of the step from which to try again."
    )


def read_reflection(text: str, answer: str) -> Fault | None:
    """From the step it names to the answer's end, with its suggestion. None for a text that is no reflection: not all
    keys, another outcome, or, where it sees no success, no suggestion or no step of the answer's; and for a success."""
    match = re.search(r"\{.*\}", text, re.DOTALL)
    if match is None:
        return None
    try:
        said = parse(match.group())
    except BadJson:
        return None
    if not isinstance(said, Mapping) or any(key not in said for key in KEYS):
        return None
    return _fault(said, answer)


def _fault(said: Mapping[str, Any], answer: str) -> Fault | None:
    outcome, hint, step = (said[key] for key in ("trajectory_outcome", "improvement_suggestion", "retry_from_step"))
    if outcome not in OUTCOMES or outcome == "success":
        return None
    lines = answer.splitlines(keepends=True)
    whole = isinstance(step, int) and not isinstance(step, bool)
    if not isinstance(hint, str) or not hint.strip() or not whole or not 0 <= step < len(lines):
        return None
    return Fault(sum(len(line) for line in lines[:step]), len(answer), hint.strip())
