"""What a set of problems is: prompts, the rows that a reward reads, and which of them are held out."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError, DataError
from hildanext.data.json_records import JsonRecords
from hildanext.data.problems.rows import read_records
from hildanext.grading.base import Reward, checked_scores

PROMPT = "{prompt}"
_WORDS = re.compile(r"[^a-z]+")
TRIED = 8
"""Right answers that are tried on the reward before anything is trained."""


@dataclass(frozen=True)
class Problem:
    """One problem, ready to be asked and judged."""

    id: str
    where: str
    """Where it stands, in words."""
    prompt: str
    """What a user would say."""
    row: Mapping[str, Any]
    """What the reward reads."""
    identity: str
    """What makes it this problem, whatever the words around it; problems that share it lie on one side of the split."""
    answer: str | None = None
    """A right answer as a model would write it, where the data have one."""


@dataclass(frozen=True)
class Split:
    """Problems to train on, and those that are held out."""

    train: Sequence[Problem]
    held_out: Sequence[Problem]
    test_set: str | None = None
    """The test set that this is, in words, where training on it was allowed. Results on it are no results."""
    fingerprint: str = field(init=False)
    """Of everything that is asked and judged, and of the sides: a resumed run goes on only while it is the same."""

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for side, problems in (("train", self.train), ("held out", self.held_out)):
            for problem in problems:
                said = [side, problem.prompt, problem.identity, problem.row]
                digest.update(json.dumps(said, sort_keys=True, default=str).encode() + b"\n")
        object.__setattr__(self, "fingerprint", digest.hexdigest()[:16])

    def facts(self) -> dict[str, Any]:
        """What a run's manifest says of its problems."""
        facts = {"train": len(self.train), "held_out": len(self.held_out), "fingerprint": self.fingerprint}
        return facts if self.test_set is None else {**facts, "test_set": self.test_set}


@config
class ProblemSet:
    """Where problems come from. The configuration is all its state."""

    reward: ClassVar[str | None] = None
    """The reward that the rows are made for, by its name."""

    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of problems that are never trained on, chosen by a hash of each: the same whatever stands beside it, and a
    larger share holds the smaller one."""
    template: str = PROMPT
    """What is said around a prompt, which stands for `{prompt}`."""

    def __post_init__(self) -> None:
        if self.template.count(PROMPT) != 1:
            raise ConfigError(f"template {self.template!r:.80}", f"let {PROMPT} stand in it once")

    def problems(self) -> Iterator[Problem]:
        """All problems in order, before the template. Raises `DataError` for one that cannot be asked, with its
        place."""
        raise NotImplementedError

    def test_set(self, problems: Sequence[Problem]) -> str | None:
        """The test set that these are, in words; None where they are none, as far as can be seen."""
        return None

    def may_train_on_test_set(self) -> bool:
        return False

    def read(self, reward: Reward) -> list[Problem]:
        """All problems, as asked and fit for the reward; to judge a model with, test set or not.

        Raises `DataError` where a problem lacks what the reward needs, naming its place, where there is none at all,
        and where right answers that the data hold earn nothing.
        """
        read = []
        for problem in self.problems():
            try:
                reward.check(problem.row)
            except DataError as missing:
                raise DataError(f"{problem.where}: {missing.message}", missing.hint) from None
            said = self.template.replace(PROMPT, problem.prompt)
            read.append(Problem(problem.id, problem.where, said, problem.row, problem.identity, problem.answer))
        if not read:
            raise DataError("the problems are none", "give a file that holds one problem a line")
        if self.reward != "code":  # programs are not run to find out
            refuse_what_cannot_be_earned(read, reward)
        return read

    def split(self, reward: Reward) -> Split:
        """The two sides, for training. Raises `DataError` as `read`, where a side is empty that should not be, and for
        a test set unless that is allowed."""
        problems = self.read(reward)
        test_set = self.test_set(problems)
        if test_set is not None and not self.may_train_on_test_set():
            raise DataError(
                f"{test_set} is a test set",
                "train on other problems, or set allow_test_set: the run is then marked and its results on it are none",
            )
        sides: dict[bool, list[Problem]] = {False: [], True: []}
        for problem in problems:
            sides[is_held_out(problem.identity, self.held_out)].append(problem)
        if not sides[False] or (self.held_out > 0 and not sides[True]):
            counts = f"{len(sides[False])} to train on and {len(sides[True])} held out"
            raise DataError(f"held_out {self.held_out:g} leaves {counts}", "give more problems, or another share")
        return Split(tuple(sides[False]), tuple(sides[True]), test_set)


@config
class FileProblems(ProblemSet):
    """What all sets out of files share."""

    path: str | tuple[str, ...]
    """A file, a folder (searched in depth), a pattern, or a list of these."""
    limit: int | None = Field(default=None, ge=1)
    """The first so many alone."""
    allow_test_set: bool = False
    """Train on what is a test set. The run is then marked."""

    def problem(self, record: Mapping[str, Any], where: str) -> Problem:
        """One record understood. Raises `DataError` naming what it lacks."""
        raise NotImplementedError

    def problems(self) -> Iterator[Problem]:
        for number, record in enumerate(read_records(self.path)):
            if number == self.limit:
                return
            if not isinstance(record.value, dict):
                raise DataError(f"{record.where} holds {type(record.value).__name__}", "give a JSON object per line")
            yield self.problem(record.value, record.where)

    def test_set(self, problems: Sequence[Problem]) -> str | None:
        """A file that says so in its name (`test.jsonl`, `countdown3_test.jsonl`), and HumanEval wherever it stands."""
        if any(str(problem.row.get("task_id", "")).startswith("HumanEval/") for problem in problems):
            return "HumanEval"
        for file in JsonRecords(path=self.path).files():
            words = _WORDS.split(file.name.lower())
            if "test" in words or "humaneval" in words:
                return f"{file.name!r}"
        return None

    def may_train_on_test_set(self) -> bool:
        return self.allow_test_set


def is_held_out(identity: str, share: float) -> bool:
    """Whether a problem belongs to the held-out share: by the first 64 bits of a hash of it alone."""
    digest = hashlib.blake2b(identity.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def same_words(text: str) -> str:
    """A text as its problem's identity: runs of white space are one space."""
    return " ".join(text.split())


def refuse_what_cannot_be_earned(problems: Sequence[Problem], reward: Reward) -> None:
    """Raises `DataError` where the first right answers that the data hold all earn nothing."""
    known = [problem for problem in problems if problem.answer is not None][:TRIED]
    if not known:
        return
    scores, _ = checked_scores(reward, [problem.row for problem in known], [str(problem.answer) for problem in known])
    if not any(scores):
        raise DataError(
            f"{known[0].where}: the right answer {known[0].answer!r:.80} earns nothing under {type(reward).__name__}",
            "let problems and reward name one place for the answer, and the reward be the one of these rows",
        )
