"""Where in a completion the answer stands. One answer is read or none: two in one completion are no answer."""

from collections.abc import Sequence
from typing import Literal

END_OF_TEXT = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")
"""The end-of-text tokens of the supported families, spelled out."""

MARKER = "####"
OPENING, CLOSING = "<answer>", "</answer>"

Place = Literal["whole", "marker", "tags"]
"""`whole`: the completion is the answer and nothing else. `marker`: what follows the only `####` on its line. `tags`:
what stands between the only `<answer>` and the only `</answer>`."""


def cut_at(completion: str, stops: Sequence[str] = END_OF_TEXT) -> str:
    """The completion up to the first stop, which is left out."""
    ends = [end for stop in stops if (end := completion.find(stop)) >= 0]
    return completion[: min(ends)] if ends else completion


def read_answer(completion: str, place: Place) -> str | None:
    """The answer up to the end-of-text token, without spaces around it; None where there is none, or more than one."""
    text = cut_at(completion)
    if place == "marker":
        _, marker, rest = text.partition(MARKER)
        text = rest.partition("\n")[0] if marker and MARKER not in rest else ""
    elif place == "tags":
        text = _between(text)
    return text.strip() or None


def _between(text: str) -> str:
    if text.count(OPENING) != 1 or text.count(CLOSING) != 1:
        return ""
    return text.partition(OPENING)[2].partition(CLOSING)[0] if text.find(OPENING) < text.find(CLOSING) else ""
