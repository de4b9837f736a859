"""A document that is being written, and what one forward does to it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext.decoding.base import Canvas, Edit, RowFacts
from hildanext.decoding.trajectory import Recorder, Trajectory
from hildanext.kv_cache import BlockCache

Kind = Literal["denoise", "revise", "exact"]


@dataclass(eq=False)
class SequenceState:
    """One document. Forwards are counted for the row: those in which it took part."""

    index: int
    """Which prompt this is, whatever has left since."""
    prompt: int
    """Tokens of the prompt: they are never written."""
    limit: int
    """The row ends once this many tokens are final."""
    start: int
    """First position of the active block; everything before it is final."""
    tokens: Int[Tensor, " capacity"]
    """The document in whole blocks, masks where nothing is written yet."""
    uniform: Float[Tensor, " capacity"]
    last_clean_hidden: Float[Tensor, "blocks hidden"]
    """Clean hidden state before each block, from which `parent` alignment reads its first token; zeros at first."""
    cache: BlockCache | None
    """None runs every forward from position 0 on."""
    checks: int = 0
    prefill: int = 0
    denoise: int = 0
    commit: int = 0
    revise: int = 0
    rows: int = 0
    """Tokens of it that these forwards were fed, the prefill's left out."""
    edits: int = 0
    seed: int = 0
    recorder: Recorder | None = None
    """What it writes is recorded; None: not."""
    given: Bool[Tensor, " capacity"] | None = None
    """Where the answer was known beforehand; None: nowhere."""
    memory: Any = None
    """What its decoder remembers of the active block (`decoding.base.Canvas.memory`)."""
    eos: frozenset[int] = frozenset()
    """Ids that end the text inside a block: what stands behind one is not written. None of them where finished blocks
    may still change."""
    may_end: bool = False
    """One of these may stand in the active block."""

    def give(self, known: Sequence[tuple[int, int]]) -> None:
        """Write tokens of the answer that are known, each as (place in the answer, id), before the first step."""
        places, ids = (torch.tensor(part, device=self.tokens.device) for part in zip(*known, strict=True))
        self.given = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.given[self.prompt + places] = True
        self.tokens[self.prompt + places] = ids
        self.may_end = True

    @property
    def facts(self) -> RowFacts:
        return RowFacts(self.seed, self.start, self.recorder is not None)

    def trajectory(self) -> Trajectory | None:
        """Of its final blocks, where it was recorded. The host waits for the tokens."""
        if self.recorder is None:
            return None
        return self.recorder.trajectory(self.tokens[: self.start].tolist(), self.prompt)

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are kept."""
        return 0 if self.cache is None else self.cache.length

    @property
    def pending(self) -> int:
        """Final tokens whose keys and values are not kept."""
        assert self.cached <= self.start, "a block was committed before it was final"
        return self.start - self.cached

    @property
    def unfed(self) -> int:
        """Tokens of the prompt's whole blocks that are still to be prefilled; without a cache there is no prefill."""
        return self.pending if self.cache is not None and self.start <= self.prompt else 0


@dataclass(frozen=True)
class Step:
    """What one forward did to one row. Positions are absolute in the document."""

    row: int
    forward: int
    start: int
    kind: Kind
    masks: list[int]
    """Masked positions before the step."""
    drafts: list[tuple[int, int, float]] = field(default_factory=list)
    """Filled masks: position, token, probability."""
    edits: list[tuple[int, int, int, float]] = field(default_factory=list)
    """Rewritten tokens: position, old token, new token, probability."""
    final: bool = False
    """True where the block was finished by this step."""


def steps(
    rows: Sequence[SequenceState], canvas: Canvas, edit: Edit, places: Int[Tensor, "batch block"], kind: Kind
) -> list[Step]:
    """What an edit does to each row, in plain numbers."""
    final = edit.final[:, None].expand_as(edit.write)
    whole = torch.stack([places.expand_as(edit.tokens), canvas.tokens, canvas.masked, edit.write, edit.tokens, final])
    columns: list[Any] = [*whole.tolist(), edit.confidence.tolist()]
    taken = []
    for r, row in enumerate(rows):
        cells = list(zip(*(column[r] for column in columns), strict=True))
        taken.append(
            Step(
                row=row.index,
                forward=row.denoise + row.revise,
                start=cells[0][0],
                kind=kind,
                masks=[place for place, _, masked, *_ in cells if masked],
                drafts=[(place, new, p) for place, _, masked, write, new, _, p in cells if write and masked],
                edits=[(place, old, new, p) for place, old, masked, write, new, _, p in cells if write and not masked],
                final=bool(cells[0][5]),
            )
        )
    return taken
