"""Texts of tokens as a server told them, for whoever shows tokens: its tokenizer is not here."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase


class ServerTokenizer(PreTrainedTokenizerBase):
    """Knows the text of each token that it was told of, and nothing else of a tokenizer's."""

    def __init__(self) -> None:
        self.__dict__["known"] = {}  # the base class minds ordinary attributes

    def __repr__(self) -> str:
        return f"ToldTokens({len(self.__dict__['known'])})"

    def learn(self, tokens: Iterable[tuple[int, str]]) -> None:
        """Ids and their texts."""
        self.__dict__["known"].update(tokens)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of ids; nothing for one that was never told."""
        return "".join(self.__dict__["known"].get(token, "") for token in token_ids)
