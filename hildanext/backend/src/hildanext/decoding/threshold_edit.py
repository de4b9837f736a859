"""LLaDA2.1's joint threshold: fill what the model is sure of, rewrite what it has become surer about."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.core.registry import build
from hildanext.decoding.base import Canvas, Decoder, Denoiser, Edit, Sampling, most_confident
from hildanext.decoding.reveal import REVEALS, Facts, Reveal, section_schema
from hildanext.decoding.reveal.base import Memory, entropies
from hildanext.models.sampling import candidates


@config
class ThresholdEdit(Decoder):
    """Fill masked positions the model is sure of; rewrite written ones it disagrees with.

    With v the candidate and p its probability, position i is written when it is masked and p_i > tau_mask (or by
    another rule, `reveal`), or when it holds another token of ours and p_i > tau_edit (both strict; editing goes on
    while masks remain). A block is final when it has no mask and a forward changes nothing, or after `max_post`
    forwards without masks.

    Paper: LLaDA2.1, arXiv:2602.08676.
    Differs: a row where nothing passes commits its most confident mask, ties to the lowest position (as the
    released checkpoint's own loop does), or another one (`fallback`); the mask and unused rows cannot be candidates;
    multi-block editing, whose algorithm is not published, is ours (`window`); at a temperature, one draw per position
    lasts for the whole block.
    """

    tau_mask: float = Field(title="Fill a mask above", default=0.7, ge=0, le=1, allow_inf_nan=False)
    """Probability above which a mask is filled; 1 fills one position per forward."""
    tau_edit: float | None = Field(title="Edit a word above", default=0.5, ge=0, le=1, allow_inf_nan=False)
    """Probability above which a written token is replaced; off (None) edits nothing, 0 on any disagreement."""
    max_post: int = Field(title="Forwards once filled", default=16, ge=0, json_schema_extra={"request_maximum": 1024})
    """Forwards a block may have after its last mask was filled."""
    tau_cautious: float | None = Field(title="Where unsure, above", default=None, ge=0, le=1, allow_inf_nan=False)
    """Where the masks' mean confidence m is low, fill above tau_cautious + m (tau_mask - tau_cautious); off is None."""
    kv_safe: bool = Field(title="End only when settled", default=False)
    """End a block only with a forward that changed nothing: at most one forward more, never another token."""
    window: int = Field(title="Blocks still edited", default=0, ge=0, json_schema_extra={"request_maximum": 1024})
    """Finished blocks that are offered for editing again after each block; their text is held back until then."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, json_schema_extra={"request_maximum": 100})
    """0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Draw from the likeliest tokens that hold this probability together; None is all of them."""
    top_k: int | None = Field(default=None, ge=1, le=2147483648)
    """Draw from this many of the likeliest tokens; None is all of them."""
    reveal: dict[str, Any] | str | None = Field(
        title="Rule of filling", default=None, json_schema_extra=section_schema()
    )
    """Which masks are filled, a name or a section such as {"name": "factor", "f": 1.0}: threshold (off is this one),
    factor, entropy_bound, klass, credit, hierarchical, or card (FULL)."""
    fallback: Literal["confident", "left", "entropy"] = Field(title="Where nothing passes", default="confident")
    """The mask that is filled where no mask passes: the surest, the leftmost, or that of the lowest entropy."""

    def __post_init__(self) -> None:
        section = {"name": self.reveal} if isinstance(self.reveal, str) else self.reveal
        rule = build("decoder.reveal", REVEALS, {"name": "threshold"} if section is None else section, strict=True)
        own = tuple(getattr(self, knob.name) for knob in fields(self) if knob.name != "reveal")
        # Once, in the context whose profile admits it; and a section is no key of a dict, so the hash is kept as well.
        object.__setattr__(self, "_rule", rule)
        object.__setattr__(self, "_hash", hash((own, repr(rule))))
        if self.window > 0 and self.tau_edit is None:
            raise ConfigError("window edits finished blocks but tau_edit is off", "give tau_edit, or window 0")

    def __hash__(self) -> int:
        return int(self.__dict__["_hash"])

    @property
    def rule(self) -> Reveal:
        """What `reveal` names."""
        rule: Reveal = self.__dict__["_rule"]
        return rule

    @property
    def sampling(self) -> Sampling | None:
        return None if self.rule.shifts else (self.temperature, self.top_p, self.top_k)

    def needs(self, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        return canvas.masked if self.tau_edit is None else canvas.masked | canvas.editable

    def edit(self, logits: Float[Tensor, "rows vocab"], where: Bool[Tensor, "batch block"], canvas: Canvas) -> Edit:
        uniform = canvas.uniform[canvas.places(where)] if self.temperature > 0.0 else None
        raised, memory = self._raised(logits, where, canvas)
        picks, sure = candidates(raised, uniform, self.temperature, self.top_p, self.top_k)
        tokens = canvas.tokens.masked_scatter(where, picks)
        confidence = torch.zeros(where.shape, dtype=sure.dtype, device=sure.device).masked_scatter(where, sure)
        had_masks = canvas.masked.any(-1)
        facts = self._facts(logits, where, canvas, confidence)
        fill, memory = self.rule.reveal(facts, canvas, memory)
        fill = fill | (self._one(facts, canvas) & ~fill.any(-1, keepdim=True))
        write = fill | self._rewrites(tokens, confidence, canvas)
        checks = canvas.checks + ~had_masks
        filled = ~canvas.left(write, tokens).any(-1)
        final = ~had_masks & ~write.any(-1)
        if not self.kv_safe:
            final |= filled & (checks >= self.max_post)
        if self.rule.shifts:  # what is told is the model's own
            own = (logits.gather(-1, picks[:, None])[:, 0] - logits.logsumexp(-1)).exp()
            confidence = torch.zeros_like(confidence).masked_scatter(where, own)
        return Edit(write, tokens, confidence, final, memory=memory)

    def _raised(self, logits: Tensor, where: Tensor, canvas: Canvas) -> tuple[Tensor, Memory]:
        """The logits that candidates are chosen from. Of written positions they are the model's own."""
        if not self.rule.shifts:
            return logits, canvas.memory
        among = canvas.masked[canvas.places(where)]
        raised, memory = self.rule.shift(logits[among], canvas, canvas.memory)
        return logits.masked_scatter(among[:, None], raised), memory

    def _facts(self, logits: Tensor, where: Tensor, canvas: Canvas, confidence: Tensor) -> Facts:
        """What the rule and the fallback ask for."""
        entropy = log_probs = None
        wants_entropy = self.rule.wants_entropy or self.fallback == "entropy"
        if wants_entropy or self.rule.wants_log_probs:
            of_masks = logits[canvas.masked[canvas.places(where)]]
            log_probs = of_masks.log_softmax(-1)
        if wants_entropy and log_probs is not None:
            endless = torch.full(where.shape, torch.inf, dtype=log_probs.dtype, device=where.device)
            entropy = endless.masked_scatter(canvas.masked, entropies(log_probs))
        return Facts(confidence, self._fill_threshold(confidence, canvas), entropy, log_probs)

    def _one(self, facts: Facts, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        """The mask that is filled where no mask passes."""
        if self.fallback == "left":
            return canvas.masked & (canvas.masked.int().cumsum(-1) == 1)
        if self.fallback == "entropy" and facts.entropy is not None:
            return most_confident((-facts.entropy).exp(), canvas.masked)
        return most_confident(facts.confidence, canvas.masked)

    def _fill_threshold(self, confidence: Tensor, canvas: Canvas) -> Tensor | float:
        if self.tau_cautious is None:
            return self.tau_mask
        masks = canvas.masked.sum(-1, keepdim=True).clamp_min(1)
        mean = (confidence * canvas.masked).sum(-1, keepdim=True) / masks
        return self.tau_cautious + mean * (self.tau_mask - self.tau_cautious)

    def _rewrites(self, tokens: Tensor, confidence: Tensor, canvas: Canvas) -> Bool[Tensor, "batch block"]:
        if self.tau_edit is None:
            return torch.zeros_like(canvas.masked)
        write = canvas.editable & (tokens != canvas.tokens) & (confidence > self.tau_edit)
        if self.kv_safe:  # the budget is spent: this forward only confirms
            spent = ~canvas.masked.any(-1) & (canvas.checks >= self.max_post)
            write &= ~spent[:, None]
        return write

    def after_block(self, denoiser: Denoiser, rows: Sequence[int]) -> None:
        if self.window > 0:
            denoiser.revise(self.window, self.edit, rows)
