"""Is an answer well formed, whatever it says? Tags, a last line, or one box."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.grading.answer_place import MARKER, cut_at
from hildanext.grading.base import Reward, Scores
from hildanext.grading.math_answers import boxed

_TAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def tagged(text: str, tags: Sequence[str]) -> bool:
    """Whether every tag is opened and closed once, in this order, none empty, and nothing stands behind the last."""
    rest = text
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return False
        _, opened, rest = rest.partition(opening)
        inside, closed, rest = rest.partition(closing)
        if not (opened and closed and inside.strip()) or any(f"<{other}>" in inside for other in tags):
            return False
    return not rest.strip()


def final_line(text: str) -> bool:
    """Whether the last line that is not blank is `#### ` and something, and no other `####` is there."""
    last = text.rstrip().rpartition("\n")[2]
    said = last.removeprefix(f"{MARKER} ")
    return text.count(MARKER) == 1 and said != last and not said[:1].isspace() and bool(said.strip())


def one_box(text: str) -> bool:
    r"""Whether there is one `\boxed{...}`, closed and not empty."""
    inside = boxed(text) if text.count("\\boxed") + text.count("\\fbox") == 1 else None
    return inside is not None and bool(inside.strip())


@config
class FormatReward(Reward):
    """1 for a well-formed answer, whatever it says, else 0. Give it a small weight in `weighted`.

    Source: the tag rewards of d1, arXiv:2504.12216.
    Differs: d1 pays an eighth for each tag, so that tags alone earn; here all must be right and none empty.
    """

    form_only: ClassVar[bool] = True

    form: Literal["tags", "final_line", "boxed"] = "final_line"
    tags: tuple[str, ...] = ("answer",)
    """For the form `tags`: each once, in this order, the last at the end."""

    def __post_init__(self) -> None:
        bad = [tag for tag in self.tags if not _TAG.fullmatch(tag)]
        if not self.tags or bad or len(set(self.tags)) < len(self.tags):
            raise ConfigError(f"tags {list(self.tags)!r}", 'give names, each once: ["think", "answer"]')

    def check(self, problem: Mapping[str, Any]) -> None:
        """Any problem will do."""

    def score(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> Scores:
        texts = [cut_at(completion) for _, completion in zip(problems, completions, strict=True)]
        return [float(self._well_formed(text)) for text in texts]

    def _well_formed(self, text: str) -> bool:
        if self.form == "tags":
            return tagged(text, self.tags)
        return final_line(text) if self.form == "final_line" else one_box(text)
