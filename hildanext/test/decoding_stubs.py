"""Stand-ins for decoding tests: a model whose predictions are a function of its tokens, and a margin watch."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hildanext.decoding import Canvas, Decoder, Denoiser, Edit
from hildanext.models import Card, DiffusionModel
from hildanext.models.card import alignment_fields
from hildanext.models.soft_inputs import InputTable, SoftInputs

VOCAB = 40
MASK = VOCAB - 1

Script = Callable[[list[int], int], Sequence[tuple[int, float]]]
"""`script(tokens of a block, its first position)` gives the candidate and its probability for each token of it."""


class ScriptedModel(DiffusionModel):
    """A `DiffusionModel` of block alignment without weights: answers from a script, in fp64."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, script: Script, block_size: int = 4, context: int = 512) -> None:
        nn.Module.__init__(self)
        self.script, self.block_size = script, block_size
        self.card = Card(
            mask_id=MASK, vocab_rows=VOCAB, vocab_real=MASK, block_size=block_size, **alignment_fields("block")
        )
        config = SimpleNamespace(
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=1,
            hidden_size=2,
            num_hidden_layers=1,
            max_position_embeddings=context,
        )
        self.causal_lm = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=None))
        self.forwards = 0

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens

    @property
    def input_table(self) -> InputTable:
        return InputTable(torch.zeros(VOCAB, 2, dtype=torch.float64), torch.arange(VOCAB) == MASK)

    def hidden(self, tokens: Tensor, positions: Tensor, attention: object, soft: SoftInputs | None = None) -> Tensor:
        """The script knows tokens alone, whatever is mixed into a mask."""
        return self(tokens, positions, attention)

    def __call__(self, tokens: Tensor, positions: Tensor, attention: object) -> Tensor:
        self.forwards += 1
        size = self.block_size
        hidden = torch.zeros(*tokens.shape, 2, dtype=torch.float64)
        for row, (cells, places) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            for at in range(0, len(cells) - size + 1, size):
                hidden[row, at : at + size] = torch.tensor(self.script(cells[at : at + size], places[at]))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The candidate's probability is exact; the rest is spread over the other real tokens."""
        token, p = hidden[:, 0].long(), hidden[:, 1:]
        p = torch.where(p > 0, p, 1.0)  # no hidden state at all reads as token 0
        rest = ((1 - p) / (VOCAB - 2)).clamp_min(1e-300).log().expand(-1, VOCAB).clone()
        rest[:, MASK] = float("-inf")
        return rest.scatter(-1, token[:, None], p.log())


class StubTokenizer(PreTrainedTokenizerBase):
    """What decoding asks of a tokenizer, and nothing else: every token is its number and a space, or a letter."""

    def __init__(self, bos: int | None = None, eos: int | None = None, letters: bool = False) -> None:
        self.__dict__.update(bos=bos, eos=eos, letters=letters)  # the base class minds ordinary attributes

    chat_template = mask_token = None
    all_special_ids = property(lambda self: [id for id in (self.bos_token_id, self.eos_token_id) if id is not None])
    bos_token_id = property(lambda self: self.__dict__["bos"])
    eos_token_id = property(lambda self: self.__dict__["eos"])

    def __repr__(self) -> str:
        return "StubTokenizer"

    added_tokens_decoder: ClassVar[dict] = {}

    def get_vocab(self):
        return {str(token): token for token in range(VOCAB)}

    def decode(self, ids, skip_special_tokens=False, **_):
        return "".join(chr(65 + token) for token in ids) if self.letters else "".join(f"{token} " for token in ids)


class Watched(Decoder):
    """A threshold decoder that remembers how close its closest decision was."""

    def __init__(self, inner: Decoder) -> None:
        self.inner, self.window = inner, inner.window
        self.margin = float("inf")
        self.had_edits = 0

    def after_block(self, denoiser: Denoiser, rows: Sequence[int]) -> None:
        type(self.inner).after_block(self, denoiser, rows)  # with the edits that are watched

    def needs(self, canvas: Canvas) -> Tensor:
        return self.inner.needs(canvas)

    def edit(self, logits: Tensor, where: Tensor, canvas: Canvas) -> Edit:
        edit = self.inner.edit(logits, where, canvas)
        if len(logits):
            top = logits.softmax(-1).topk(2, -1).values
            gaps = [top[:, 0] - top[:, 1]]
            gaps += [(edit.confidence[where] - tau).abs() for tau in self._thresholds()]
            for row, masked in zip(edit.confidence, canvas.masked, strict=True):
                gaps.append(row[masked].sort().values.diff())
            self.margin = min(self.margin, *(float(gap.min()) for gap in gaps if len(gap)))
        self.had_edits += int((edit.write & canvas.editable).sum())
        return edit

    def _thresholds(self) -> list[float]:
        return [tau for tau in (self.inner.tau_mask, self.inner.tau_edit) if tau is not None and 0.0 < tau < 1.0]


MARGIN = 1e-9
"""Below this a decision could flip with the order of additions: such a seed proves nothing and is drawn again."""
