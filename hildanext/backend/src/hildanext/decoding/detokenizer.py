"""A row's final tokens as text: what may be shown already, and where the text ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from hildanext.data.generation_result import FinishReason
from hildanext.detokenization import Detokenizer


@dataclass(frozen=True)
class Stop:
    """Why and where a text ends. `tokens` hold the end-of-text token that ended it, `text` does not."""

    tokens: list[int]
    text: str
    reason: FinishReason


class IncrementalDetokenizer:
    """Turns the final tokens of one row into pieces of text, each shown once and never taken back.

    The text goes on from `prompt`, the row's ids before it. Without a tokenizer there is no text. Half a character and
    what may become a stop string are held back.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: Sequence[int],
        eos: frozenset[int],
        stop: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
    ) -> None:
        self.eos, self.stop, self.show = eos, tuple(stop), show
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt)
        self._shown = ""

    def add(self, tokens: list[int], full: bool, held: int = 0) -> Stop | None:
        """Look at all new tokens that are final so far; `full` where no more can follow.

        The last `held` of them may still be edited: they end a text, but are not shown.
        """
        ending = self._ending(tokens, full)
        if ending is None:
            self._say(self._text(tokens[: max(len(tokens) - held, 0)], whole=False), final=False)
        else:
            self._say(ending.text, final=True)
        return ending

    def _ending(self, tokens: list[int], full: bool) -> Stop | None:
        end = next((i for i, token in enumerate(tokens) if token in self.eos), None)
        kept = tokens if end is None else tokens[: end + 1]
        text = self._text(kept if end is None else kept[:-1], whole=full or end is not None)
        stop = min((at for at in (text.find(word) for word in self.stop) if at >= 0), default=None)
        if stop is not None:
            return Stop(self._cut(kept, text, stop), text[:stop], "stop")
        if end is not None:
            return Stop(kept, text, "eos")
        return Stop(kept, text, "length") if full else None

    def _cut(self, tokens: list[int], text: str, stop: int) -> list[int]:
        """The shortest beginning of `tokens` whose text holds the stop string whole."""
        length = stop + max(len(word) for word in self.stop if text.startswith(word, stop))
        assert self._detokenizer is not None
        ends = accumulate(len(piece) for piece in self._detokenizer.pieces(tokens))
        return tokens[: next(count for count, end in enumerate(ends, 1) if end >= length)]

    def _text(self, tokens: list[int], whole: bool) -> str:
        return "" if self._detokenizer is None else self._detokenizer.text(tokens, whole)

    def _say(self, text: str, final: bool) -> None:
        if self.show is None:
            return
        if not final:
            text = text[: len(text) - max((_overlap(text, word) for word in self.stop), default=0)]
        if text.startswith(self._shown) and len(text) > len(self._shown):
            piece, self._shown = text[len(self._shown) :], text
            self.show(piece)


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `word`."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
