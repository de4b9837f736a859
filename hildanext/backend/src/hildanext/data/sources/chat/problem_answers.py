"""Problems with right answers as conversations: what a model is taught before a reward teaches it."""

from collections.abc import Iterator
from typing import Any, Literal

from hildanext.core.config import config
from hildanext.core.errors import DataError
from hildanext.core.registry import build
from hildanext.data.sources.base import Report
from hildanext.data.sources.chat.base import ChatSource, Record


@config
class ProblemAnswers(ChatSource):
    """The problems of a set, each asked as `rl` asks it and answered by its right answer.

    What `rl` is to hold out must not be taught here: give other problems (another seed, another file), or the same set
    with `side: "train"`.
    """

    problems: dict[str, Any]
    """Section of a problem set, such as `{"name": "countdown", "numbers": 2}`."""
    side: Literal["all", "train"] = "all"
    """`all` of them, or `train`: without those that the set holds out."""

    def records(self, report: Report) -> Iterator[Record]:
        from hildanext.data.problems import PROBLEMS  # a set of problems may be made of a source of conversations
        from hildanext.data.problems.base import is_held_out

        chosen = build("problem set", PROBLEMS, self.problems)
        for problem in chosen.problems():
            if problem.answer is None:
                raise DataError(f"{problem.where} has no right answer", "take problems whose answers are known")
            if self.side == "all" or not is_held_out(problem.identity, chosen.held_out):
                said = chosen.template.replace("{prompt}", problem.prompt)
                yield Record({"prompt": said, "response": problem.answer}, problem.where)
