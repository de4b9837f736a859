"""The answers of one round of sampling, as arrays: what likelihoods, objectives and plugins are given."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from hildanext.decoding.trajectory import Trajectory
from hildanext.models.checkpoint import save_tensors


@dataclass(frozen=True)
class RolloutBatch:
    """Answers in whole blocks, one document a row, filled up on the right. Rows of a group stand together, and share
    their prompt.

    Positions count from the document's beginning; `document` is 0 there and -1 in the filling.
    """

    tokens: Int[Tensor, "rows positions"]
    """The final text, edits included, the terminal block untrimmed."""
    document: Int[Tensor, "rows positions"]
    position: Int[Tensor, "rows positions"]
    prompt: Int[Tensor, " rows"]
    """Tokens of the prompt."""
    scored: Bool[Tensor, "rows positions"]
    """The answer: up to and including its end of text, or up to its last token where it has none; less the tokens that
    were given to the sampler beforehand, which are seen as a prompt's are."""
    after: Bool[Tensor, "rows positions"]
    """Written behind the end of text, in the terminal block: actions and state for later steps, but no text."""
    step: Int[Tensor, "rows positions"]
    """Step of its block in which a mask was filled; -1 in prompt and filling, and everywhere where it is not known."""
    logp: Float[Tensor, "rows positions"]
    """Of the token that filled the mask, by the law it was drawn from, in nats; 0 elsewhere."""
    entropy: Float[Tensor, "rows positions"]
    """Of that law; 0 elsewhere."""
    group: Int[Tensor, " rows"]
    """Which problem of the round a row answers."""
    edits: Int[Tensor, "edits 5"]
    """Row, step of the block, position, old token, new token; in the order in which they were made."""
    biased: Bool[Tensor, ""] = field(default_factory=lambda: torch.tensor(False))
    """Whether the sum of log p is not that of the actions in some row; see `Trajectory.biased`."""
    kept: Int[Tensor, "rows positions"] | None = None
    """Tokens that top-k and top-p left to draw the position's from; 0 where they left all. None: there everywhere."""

    @property
    def open(self) -> Bool[Tensor, "rows positions"]:
        """Every position that the sampler could fill, to the end of the terminal block."""
        return self.scored | self.after

    @property
    def written(self) -> Bool[Tensor, "rows positions"]:
        """Every position that the sampler filled. What a block that has ended left unwritten holds masks, as it did
        when the sampler read it."""
        return self.scored | (self.after & (self.step >= 0))

    @property
    def length(self) -> Int[Tensor, " rows"]:
        """Tokens of each answer, its end of text among them."""
        return self.scored.sum(-1)

    @property
    def traced(self) -> bool:
        """Whether the steps are known in which the tokens were written."""
        return bool((self.step[self.scored] >= 0).all())

    def arrays(self) -> dict[str, Tensor]:
        """By the names of the fields; those that are None are left out."""
        named = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: array for name, array in named.items() if array is not None}

    def rows(self, chosen: Sequence[int]) -> "RolloutBatch":
        """Some of the rows, in the order given, cut to the longest of them."""
        index = torch.tensor(list(chosen), dtype=torch.long)
        whole = ("edits", "biased")
        parts: dict[str, Any] = {name: array[index] for name, array in self.arrays().items() if name not in whole}
        end = int((parts["document"] >= 0).sum(-1).max()) if len(index) else 0
        parts = {name: part[:, :end].contiguous() if part.ndim == 2 else part for name, part in parts.items()}
        place = {row: number for number, row in enumerate(chosen)}
        kept = [[place[row], *rest] for row, *rest in self.edits.tolist() if row in place]
        edits = torch.tensor(kept, dtype=torch.long).reshape(-1, 5)
        return RolloutBatch(**parts, edits=edits, biased=self.biased)

    @classmethod
    def join(cls, parts: "Sequence[RolloutBatch]") -> "RolloutBatch":
        """The rows of several batches, one after another; groups keep their numbers."""
        width, first, edits = max(part.tokens.shape[1] for part in parts), 0, []
        for part in parts:
            edits.append(part.edits + torch.tensor([first, 0, 0, 0, 0]))
            first += len(part.tokens)
        if any(part.kept is not None for part in parts):
            parts = [replace(one, kept=torch.zeros_like(one.tokens)) if one.kept is None else one for one in parts]
        joined = {
            name: _joined([getattr(part, name) for part in parts], width, name)
            for name in parts[0].arrays()
            if name != "edits"
        }
        return cls(**joined, edits=torch.cat(edits))

    def save(self, path: Path) -> None:
        """Write it as safetensors, whole or not at all."""
        save_tensors({name: array.contiguous() for name, array in self.arrays().items()}, path)

    @classmethod
    def load(cls, path: Path) -> "RolloutBatch":
        return cls(**load_file(path))


FILLING = {"document": -1, "step": -1}
"""What stands behind the end of a row, where that is not 0."""


def _joined(parts: "Sequence[Tensor]", width: int, name: str) -> Tensor:
    if parts[0].ndim == 0:  # what is said of the whole batch
        return torch.stack(list(parts)).any()
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    return torch.cat([pad(part, (0, width - part.shape[1]), value=FILLING.get(name, 0)) for part in parts])


@dataclass(frozen=True)
class Answer:
    """One answer as an engine gave it: a trajectory, or tokens alone where the engine tells no more."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """The answer's, its end of text among them."""
    text: str
    ended: bool
    """By its own end of text, not by the limit."""
    forwards: int
    weights: int
    """Version of the weights that wrote it."""
    trajectory: Trajectory | None = None
    given: tuple[int, ...] = ()
    """Places in the answer whose tokens were known to the sampler beforehand."""


def collate(answers: Sequence[Answer], group: Sequence[int], block_size: int, fill: int) -> RolloutBatch:
    """One row for each answer. Where there is no trajectory, the terminal block holds `fill` behind the answer."""
    documents = [_document(answer, block_size, fill) for answer in answers]
    width = max(len(tokens) for tokens, _ in documents)
    shape = len(answers), width
    tokens, document = torch.full(shape, fill), torch.full(shape, -1)
    position, step = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    scored, after = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    logp, entropy = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    filtered = any(trace is not None and trace.kept is not None for _, trace in documents)
    kept = torch.zeros(shape, dtype=torch.long) if filtered else None
    edits: list[list[int]] = []
    for row, (answer, (whole, trace)) in enumerate(zip(answers, documents, strict=True)):
        first, end, stop = len(answer.prompt), len(answer.prompt) + len(answer.tokens), len(whole)
        tokens[row, :stop], document[row, :stop] = torch.tensor(whole), 0
        position[row, :stop] = torch.arange(stop)
        scored[row, first:end], after[row, end:stop] = True, True
        known = [first + place for place in answer.given if first + place < stop]
        scored[row, known], after[row, known] = False, False
        if trace is not None:
            step[row, :stop], logp[row, :stop] = torch.from_numpy(trace.step), torch.from_numpy(trace.logp)
            entropy[row, :stop] = torch.from_numpy(trace.entropy)
            if kept is not None and trace.kept is not None:
                kept[row, :stop] = torch.from_numpy(trace.kept)
            edits += [[row, *edit] for edit in trace.edits.tolist()]
    return RolloutBatch(
        tokens=tokens,
        document=document,
        position=position,
        prompt=torch.tensor([len(answer.prompt) for answer in answers]),
        scored=scored,
        after=after,
        step=step,
        logp=logp,
        entropy=entropy,
        group=torch.tensor(list(group)),
        edits=torch.tensor(edits, dtype=torch.long).reshape(-1, 5),
        biased=torch.tensor(any(trace is not None and trace.biased for _, trace in documents)),
        kept=kept,
    )


def _document(answer: Answer, block_size: int, fill: int) -> tuple[list[int], Trajectory | None]:
    if answer.trajectory is not None:
        return answer.trajectory.tokens.tolist(), answer.trajectory
    tokens = [*answer.prompt, *answer.tokens]
    return [*tokens, *[fill] * (-len(tokens) % block_size)], None
