"""Texts to token ids, in batches, with the document's first and last token added."""

import hashlib
import json
from typing import Any

from hildanext.core.errors import DataError

PROBE = "".join(map(chr, range(1, 0x250))) + " Once upon a time, 12,345 didn't you're\n\n\t x==y; 你好 🙂"


class Encoder:
    """A private copy of a tokenizer's fast backend: no truncation, no padding, nothing added but BOS and EOS.

    A mask token is left out of the vocabulary, so that a parent's tokenizer and its converted twin's are the same.
    Raises `DataError` for a slow tokenizer and for a BOS or EOS that is wanted but not there.
    """

    def __init__(
        self,
        tokenizer: Any,
        add_bos: bool = True,
        add_eos: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens_in_text: bool = False,
    ) -> None:
        self._backend = _private(tokenizer)
        self._backend.encode_special_tokens = not special_tokens_in_text
        self._vocabulary = _vocabulary(tokenizer)
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.bos = self._edge("bos", bos_token, tokenizer.bos_token) if add_bos else None
        self.eos = self._edge("eos", eos_token, tokenizer.eos_token) if add_eos else None
        # padding of blocks and rows needs an id even where documents end without one
        self.pad = self.eos if self.eos is not None else self._edge("eos", eos_token, tokenizer.eos_token)

    def texts(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return [
            self.framed(encoding.ids) for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def framed(self, ids: list[int]) -> list[int]:
        """With BOS and EOS at the ends; one that is there already is not doubled."""
        opening = [self.bos] if self.bos is not None and ids[:1] != [self.bos] else []
        closing = [self.eos] if self.eos is not None and ids[-1:] != [self.eos] else []
        return [*opening, *ids, *closing]

    def _edge(self, which: str, chosen: str | None, own: str | None) -> int:
        token = chosen if chosen is not None else own
        if token is None:
            raise DataError(
                f"the tokenizer has no {which.upper()} token",
                f'set {which}_token (for example "<|endoftext|>")' + (" or add_bos=false" if which == "bos" else ""),
            )
        if str(token) not in self._vocabulary:
            raise DataError(
                f"{which}_token {str(token)!r} is not in the vocabulary", "give a token that the tokenizer has"
            )
        return self._vocabulary[str(token)]


def tokenizer_hash(tokenizer: Any) -> str:
    """Of the vocabulary and of how a probe is cut; independent of the library that wrote the file, and of a mask."""
    cut = _private(tokenizer).encode(PROBE, add_special_tokens=False).ids
    return hashlib.sha256(json.dumps([sorted(_vocabulary(tokenizer).items()), cut]).encode()).hexdigest()


def _private(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer", "give one that has a tokenizer.json")
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    everything: dict[str, int] = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    mask = tokenizer.mask_token  # None where there is none; many vocabularies hold the word "None"
    return everything if mask is None else {token: index for token, index in everything.items() if token != str(mask)}
