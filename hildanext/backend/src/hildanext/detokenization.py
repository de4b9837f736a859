"""Token ids as text: the one place where a tokenizer is asked to decode.

A token is bytes, and a text is the UTF-8 of its tokens' bytes: so a stream, a whole answer, log-probabilities and
traces hold the same text. What a tokenizer does to the beginning of a text (SentencePiece strips a space) is done where
a document begins, never where a prompt goes on. `clean_up_tokenization_spaces` is off, whatever the tokenizer says.
"""

import json
from codecs import getincrementaldecoder
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"
"""What half a character shows as."""
SEPARABLE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}
"""Decoders of the tokenizers library under which a token behind the first is the same text beside any other."""

_Utf8 = getincrementaldecoder("utf-8")


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids that no text shows: control tokens, as the end of text."""
    marked = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    return frozenset([*marked, *tokenizer.all_special_ids])


def pieces_of(raws: Iterable[bytes]) -> list[str]:
    """Texts that join to the text of all bytes: a character belongs to the token that ends it, half of one that is
    never ended is one U+FFFD."""
    decoder, pieces = _Utf8("replace"), list[str]()
    for raw in raws:
        if pieces and raw and not 0x80 <= raw[0] < 0xC0:
            pieces[-1] += decoder.decode(b"", final=True)
        pieces.append(decoder.decode(raw))
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    return pieces


def cut_pieces(raws: Sequence[bytes], text: str) -> list[tuple[str, bytes]]:
    """Text and bytes of each token, of which no more than `text` is told: what a stop cut off has neither."""
    told, left = list[tuple[str, bytes]](), len(text)
    for raw, piece in zip(raws, pieces_of(raws), strict=True):
        shown = piece[:left]
        told.append((shown, raw if left and shown == piece else shown.encode()))
        left -= len(shown)
    return told


def cell_bytes(cell: Mapping[str, Any], prefix: str = "") -> bytes:
    """The bytes of a record's token: `bytes` where it is no whole characters, else its `text`."""
    part = cell.get(f"{prefix}bytes")
    return bytes(part) if part is not None else str(cell[f"{prefix}text"]).encode()


class _TokenTable:
    """The bytes of a tokenizer's tokens, each found out once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        steps = None if backend is None else _steps(backend.decoder)
        self.byte_level = steps == ["ByteLevel"]
        self.separable = self.byte_level or (steps is not None and SEPARABLE.issuperset(steps))
        self.byte_fallback = steps is not None and "ByteFallback" in steps
        self._known: dict[tuple[int, bool], bytes] = {}

    def find(self, tokenizer: "PreTrainedTokenizerBase", token: int, first: bool) -> bytes:
        """The bytes of a token; `first` where a document begins with it."""
        known = self._known.get((token, first))
        if known is None:
            known = self._known[token, first] = self._found(tokenizer, token, first)
        return known

    def _found(self, tokenizer: "PreTrainedTokenizerBase", token: int, first: bool) -> bytes:
        named = self.byte_level or self.byte_fallback
        name = str(tokenizer.convert_ids_to_tokens(token) or "") if named else ""
        if self.byte_level:
            letters = _byte_letters()
            return bytes(letters[one] for one in name) if letters.keys() >= set(name) else name.encode()
        if self.byte_fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            raw = bytes.fromhex(name[3:5])
            if not first or raw >= b"\x80":
                return raw
        alone = decoded(tokenizer, [token])
        return (alone if first else decoded(tokenizer, [token, token])[len(alone) :]).encode()


_tables: "WeakKeyDictionary[PreTrainedTokenizerBase, _TokenTable]" = WeakKeyDictionary()


def _table(tokenizer: "PreTrainedTokenizerBase") -> _TokenTable:
    table = _tables.get(tokenizer)
    if table is None:
        table = _tables[tokenizer] = _TokenTable(tokenizer)
    return table


def _steps(decoder: Any) -> list[str]:
    """The kinds of a decoder's steps, in order; none where tokens are joined by spaces."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return [part["type"] for part in state.get("decoders", [state])]


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """GPT-2's letter of every byte: printable ones stand for themselves, the others come behind U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """What the library makes of the ids as a text of their own, control tokens by name."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Detokenizer:
    """The text of tokens behind a context (a prompt's ids; none where they begin their document)."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", context: Sequence[int] = ()) -> None:
        self.tokenizer, self.hidden = tokenizer, special_ids(tokenizer)
        self._before = next(([token] for token in reversed(context) if token not in self.hidden), list[int]())
        self._table = _table(tokenizer)
        self._tokens: list[int] = []
        self._raws: list[bytes] = []

    def raws(self, tokens: Sequence[int]) -> list[bytes]:
        """Each token's bytes; none for a control token. What was asked before is not found out again."""
        tokens = list(tokens)
        if not self._table.separable:
            return self._windowed(tokens)
        same = len(self._tokens)
        if tokens[:same] != self._tokens:
            same = next(i for i, token in enumerate(self._tokens) if tokens[i : i + 1] != [token])
        del self._raws[same:]
        first = not self._before and all(token in self.hidden for token in tokens[:same])
        for token in tokens[same:]:
            shown = token not in self.hidden
            self._raws.append(self._table.find(self.tokenizer, token, first) if shown else b"")
            first = first and not shown
        self._tokens = tokens
        return self._raws.copy()

    def text(self, tokens: Sequence[int], whole: bool = True) -> str:
        """The tokens' text; where it is not `whole` yet, half a character at its end is left out."""
        return str(_Utf8("replace").decode(b"".join(self.raws(tokens)), final=whole))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """A text for each token, which join to `text`."""
        return pieces_of(self.raws(tokens))

    def _windowed(self, tokens: list[int]) -> list[bytes]:
        """For a tokenizer of an unknown kind: what each token adds to the text of the one before it. Tokens that end
        inside a character add nothing, the one that ends it adds it whole."""
        raws, window = list[bytes](), self._before
        known = decoded(self.tokenizer, window).rstrip(HALF) if window else ""
        for token in tokens:
            if token in self.hidden:
                raws.append(b"")
                continue
            window = [*window, token]
            longer = decoded(self.tokenizer, window)
            if longer.endswith(HALF):
                raws.append(b"")
                continue
            raws.append(longer[len(known) :].encode())
            window, known = [token], decoded(self.tokenizer, [token])
        return raws


class TokenCells:
    """Texts of single tokens at places of one document, for pictures of it; control tokens are shown by name."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int]) -> None:
        self.tokenizer, self.hidden, self._prompt = tokenizer, special_ids(tokenizer), list(prompt)
        shown = (at for at, token in enumerate(self._prompt) if token not in self.hidden)
        self._begins = next(shown, len(self._prompt))

    def cell(self, position: int, token: int, prefix: str = "") -> dict[str, Any]:
        """`text`, and `bytes` where the token is no whole characters; `prefix` goes before both names."""
        if token in self.hidden:
            return {f"{prefix}text": decoded(self.tokenizer, [token])}
        raw = _table(self.tokenizer).find(self.tokenizer, token, position == self._begins)
        text = raw.decode("utf-8", "replace")
        return {f"{prefix}text": text} | ({f"{prefix}bytes": list(raw)} if text.encode() != raw else {})

    def shown(self, position: int, token: int) -> tuple[str, bytes]:
        """Text and bytes, both empty for a control token."""
        cell = self.cell(position, token)
        return ("", b"") if token in self.hidden else (cell["text"], cell_bytes(cell))

    def prompt(self) -> list[dict[str, Any]]:
        """The prompt's tokens as cells."""
        return [{"position": at, "token": token, **self.cell(at, token)} for at, token in enumerate(self._prompt)]
