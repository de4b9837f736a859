"""What a decoder is, and the one loop that runs it: forwards of active blocks become edits, until every block is final.

State that changes travels in values (`Canvas`, `Edit` and the memory in both), never in the algorithm, which is its own
frozen configuration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.sampling import law
from hildanext.models.soft_inputs import InputTable, SoftInputs


class RowFacts(NamedTuple):
    """What the host knows of a row of a canvas."""

    seed: int
    start: int
    """Position of the active block in the document."""
    recorded: bool
    """Whether somebody wants to know how likely its tokens were."""


class Ends(NamedTuple):
    """Where a text may end inside a block."""

    eos: Int[Tensor, " ids"]
    own: Bool[Tensor, "batch block"]
    """True where one of these ids ends the text: in the answer, of a row that ends so."""

    def stand_in(self, tokens: Int[Tensor, "batch block"]) -> Bool[Tensor, " batch"]:
        """Rows that hold such an end, whatever stands before it."""
        return ((tokens[..., None] == self.eos).any(-1) & self.own).any(-1)

    def behind(
        self, tokens: Int[Tensor, "batch block"], unwritten: Bool[Tensor, "batch block"]
    ) -> Bool[Tensor, "batch block"]:
        """The positions behind a written end of text before which everything is written."""
        ends = (tokens[..., None] == self.eos).any(-1) & self.own & ~unwritten
        if ends.device.type == "cpu" and not ends.any():
            return ends
        ends &= unwritten.int().cumsum(-1) == 0
        return (ends.int().cumsum(-1) - ends.int()) > 0


@dataclass(frozen=True)
class Canvas:
    """The active block of every row, as it is before a forward."""

    tokens: Int[Tensor, "batch block"]
    masked: Bool[Tensor, "batch block"]
    """True where the token is a mask that is to be filled."""
    fixed: Bool[Tensor, "batch block"]
    """True for a token of the prompt, or one that was given: it may be neither filled nor edited."""
    uniform: Float[Tensor, "batch block"]
    """One draw from [0, 1) for each position, the same in every step: what sampling may use."""
    checks: Int[Tensor, " batch"]
    """Forwards the block has had whose input held no mask."""
    rows: tuple[RowFacts, ...] = ()
    """Of each row; empty where nobody asks for streams of their own, nor for records."""
    memory: tuple[Any, ...] = ()
    """Of each row what `Edit.memory` left in its block's last step, None in the first; empty where nobody remembers."""
    closed: Bool[Tensor, "batch block"] | None = None
    """True behind the end of the text or its limit: fed as it is, neither filled nor edited. None: nowhere."""
    shut: Bool[Tensor, "batch block"] | None = None
    """The masks among them that an end of text closes: an edit of it opens them again. None: there are none."""
    ends: Ends | None = None
    """What closes positions beside the limit; None: nothing does."""

    @property
    def editable(self) -> Bool[Tensor, "batch block"]:
        """Written by us, and not a mask."""
        own = ~self.masked & ~self.fixed
        return own if self.closed is None else own & ~self.closed

    def left(
        self, write: Bool[Tensor, "batch block"], tokens: Int[Tensor, "batch block"]
    ) -> Bool[Tensor, "batch block"]:
        """The masks that are still to be filled once `tokens` are written at `write`: not those behind an end of text
        that this writes, but those behind one that it takes away."""
        left = (self.masked if self.shut is None else self.masked | self.shut) & ~write
        return left if self.ends is None else left & ~self.ends.behind(torch.where(write, tokens, self.tokens), left)

    @cached_property
    def every(self) -> Bool[Tensor, "batch block"]:
        """All positions of the block."""
        return torch.ones_like(self.masked)

    def read(self, needed: Bool[Tensor, "batch block"]) -> Bool[Tensor, "batch block"]:
        """The positions whose logits are made where those at `needed` are wanted.

        On a CPU the same. Elsewhere every one: the host would have to wait for the device to count them, once a
        step, and a few more rows of the head cost less than that.
        """
        return needed if needed.device.type == "cpu" else self.every

    def places(self, where: Bool[Tensor, "batch block"]) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Row and place of the chosen positions, in row-major order. Every position's are known without waiting."""
        if where.device.type == "cpu" or where is not self.every:
            row, place = where.nonzero(as_tuple=True)
            return row, place
        index = torch.arange(where.numel(), device=where.device)
        return index // where.shape[1], index % where.shape[1]

    def with_memory(self, memory: tuple[Any, ...]) -> "Canvas":
        """The same canvas, whose decoder remembers something else."""
        other = replace(self, memory=memory)
        if "every" in self.__dict__:  # known by identity (`places`)
            other.__dict__["every"] = self.every
        return other

    def apply(self, edit: "Edit") -> Int[Tensor, "batch block"]:
        """The tokens after an edit."""
        return torch.where(edit.write, edit.tokens, self.tokens)


@dataclass(frozen=True)
class Chances:
    """How likely what a forward wrote was by the law it was drawn from (`models.sampling.law`), in nats and fp64; 0
    where nothing was written, and in rows that are not recorded."""

    logp: Float[Tensor, "batch block"]
    entropy: Float[Tensor, "batch block"]
    """Of that law."""
    kept: Int[Tensor, "batch block"] | None = None
    """Tokens that top-k and top-p left of that law; None where the sampler has neither."""


Sampling = tuple[float, float | None, int | None]
"""Temperature, top-p and top-k."""


@dataclass(frozen=True)
class Edit:
    """What one forward changes."""

    write: Bool[Tensor, "batch block"]
    tokens: Int[Tensor, "batch block"]
    confidence: Float[Tensor, "batch block"]
    """Probability of each token in the model's own distribution (0 where no logits were asked for; no number where
    these are none, for which the step is refused)."""
    final: Bool[Tensor, " batch"]
    """True for a row whose block is finished once this edit is applied."""
    chances: Chances | None = None
    """Where a row of the canvas is recorded."""
    memory: tuple[Any, ...] = ()
    """Of each row what the decoder wants to find in its block's next step (`Canvas.memory`); empty: nothing."""


EditRule = Callable[[Tensor, Tensor, Canvas], Edit]
"""`edit(logits, where, canvas)`, as `Decoder.edit`."""
CausalLogits = Callable[[Tensor, Tensor], Tensor]
"""`causal_logits(tokens, where)`, as `Denoiser.causal_logits`."""


@runtime_checkable
class Denoiser(Protocol):
    """The model's side of decoding; `hildanext.decoding.state` is one, a test's table of logits another.

    Rows are counted as in the last canvas.
    """

    def canvas(self) -> Canvas | None:
        """The active blocks, or None once every row has ended. Rows may move to their next block at any time."""

    def input_table(self) -> InputTable:
        """The model's input embeddings, for `Decoder.soft`. Raises `ModelError` where soft inputs cannot be fed."""

    def logits(self, where: Bool[Tensor, "batch block"], soft: SoftInputs | None = None) -> Float[Tensor, "rows vocab"]:
        """One forward of the active blocks; the logits that predict the chosen positions, in row-major order. `soft`,
        of shape [batch block], is heeded at masks alone."""

    def write(self, edit: Edit) -> list[int]:
        """Apply an edit; rows whose block is final move on. Returns those. Raises `LogitsNotFinite`, and then nothing
        was written."""

    def causal_logits(
        self, tokens: Int[Tensor, "batch block"], where: Bool[Tensor, "batch block"]
    ) -> Float[Tensor, "rows vocab"]:
        """After `logits`, one forward more: what the model says at block size 1 at the positions `where`, row-major,
        each read from what stands left of it if the active blocks held `tokens`."""

    def revise(self, window: int, edit: EditRule, rows: Sequence[int]) -> None:
        """Of rows whose block has just become final: offer the `window` finished blocks before it to `edit`."""


class Decoder:
    """Turns the logits of one forward into one edit; rows advance independently. Members are frozen knobs."""

    research: ClassVar[bool] = False
    """A research method: built under the profile FULL alone."""
    searches: ClassVar[bool] = False
    """Writes several texts of a prompt and chooses among them: run by a driver of its own, which owns the rows."""
    window = 0
    """Finished blocks that may still change; their text is not shown yet."""

    @property
    def sampling(self) -> Sampling | None:
        """What a written token is drawn by. None where no one law describes it, so that nothing can be recorded."""
        return None

    @property
    def biased(self) -> bool:
        """Whether which positions are written depends on what was drawn: log p of a token is then not that of the
        action."""
        return True

    def check_model(self, model: DiffusionModel) -> None:
        """Raise `ConfigError` where this decoder cannot be used, or was not meant to be, with a model."""

    def soft(self, canvas: Canvas, input_table: Callable[[], InputTable]) -> SoftInputs | None:
        """What is fed at masks of the active blocks in place of their embedding, [batch block]; None: nothing else."""
        return None

    def needs(self, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        """Positions whose logits `edit` will read."""
        return canvas.masked | canvas.editable

    def edit(self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas) -> Edit:
        """What to write, given the logits at `where` (row-major)."""
        raise NotImplementedError(f"{type(self).__name__} has no edit")

    def verify(self, edit: Edit, canvas: Canvas, causal_logits: CausalLogits) -> Edit:
        """What is written of an edit; the denoiser's `causal_logits` may be asked about it first."""
        return edit

    def chances(
        self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas, edit: Edit
    ) -> Chances:
        """How likely the tokens were that recorded rows write; `logits` at `where`, as `edit` had them."""
        assert self.sampling is not None, "no law describes what this decoder writes"
        recorded = torch.tensor([row.recorded for row in canvas.rows], device=where.device)
        written = edit.write & recorded[:, None]
        assert not (written & ~where).any(), "a token was written without its logits"
        probability = law(logits[written[canvas.places(where)]], *self.sampling)
        logp = probability.gather(-1, edit.tokens[written][:, None])[:, 0].log()
        nothing = torch.zeros(where.shape, dtype=torch.float64, device=where.device)
        entropy = torch.special.entr(probability).sum(-1)
        kept = None
        if any(filtering is not None for filtering in self.sampling[1:]):
            none = torch.zeros(where.shape, dtype=torch.long, device=where.device)
            kept = none.masked_scatter(written, (probability > 0).sum(-1))
        return Chances(nothing.masked_scatter(written, logp), nothing.masked_scatter(written, entropy), kept)

    def after_block(self, denoiser: Denoiser, rows: Sequence[int]) -> None:
        """A step has finished the blocks of `rows`; what is revised here is revised before their text is looked at."""


def run(decoder: Decoder, denoiser: Denoiser) -> None:
    """Step until every row has ended."""
    assert not decoder.searches, "a search has a driver of its own"
    while (canvas := denoiser.canvas()) is not None:
        step(decoder, denoiser, canvas)


def step(decoder: Decoder, denoiser: Denoiser, canvas: Canvas) -> list[int]:
    """One forward and what follows from it; the rows whose block it finished. The engine calls this one, too."""
    where = canvas.read(decoder.needs(canvas))
    soft = decoder.soft(canvas, denoiser.input_table)
    logits = denoiser.logits(where) if soft is None else denoiser.logits(where, soft)
    edit = decoder.verify(decoder.edit(logits, where, canvas), canvas, denoiser.causal_logits)
    if any(row.recorded for row in canvas.rows):
        edit = replace(edit, chances=decoder.chances(logits, where, canvas, edit))
    finished = denoiser.write(edit)
    if finished:
        decoder.after_block(denoiser, finished)
    return finished


def most_confident(
    confidence: Float[Tensor, "batch block"], among: Bool[Tensor, "batch block"]
) -> Bool[Tensor, "batch block"]:
    """The one most confident position among those allowed, ties to the lowest; nothing in a row that allows none."""
    best = confidence.masked_fill(~among, -1.0).argmax(-1, keepdim=True)
    return torch.zeros_like(among).scatter_(-1, best, True) & among


def fill_above(
    confidence: Float[Tensor, "batch block"], masked: Bool[Tensor, "batch block"], tau: Tensor | float
) -> Bool[Tensor, "batch block"]:
    """The masks above a threshold (strictly), or of a row that has none there the most confident one."""
    fill = masked & (confidence > tau)
    stuck = ~fill.any(-1, keepdim=True)
    return fill | (stuck & most_confident(confidence, masked))
