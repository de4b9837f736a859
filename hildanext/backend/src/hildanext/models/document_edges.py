"""How documents begin and end: a tokenizer is made to do it as the data does."""

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from hildanext.core.errors import ConfigError
from hildanext.models.bidirectional import DiffusionModel


def adopt_edges(
    model: DiffusionModel, tokenizer: PreTrainedTokenizerBase, edges: Collection[tuple[int | None, int]]
) -> None:
    """Make the tokenizer begin and end texts as the data does, so that what is generated begins as training did.

    `edges` are the (BOS, EOS) ids of the data sets; BOS None means that documents begin with their text. Raises
    `ConfigError` where they differ, or where a tokenizer could not tell them from text.
    """
    if len(set(edges)) != 1:
        raise ConfigError(
            f"the data sets differ in how documents begin and end: BOS and EOS {sorted(set(edges), key=str)}",
            "prepare them with the same bos_token, eos_token and add_bos",
        )
    [(bos, eos)] = set(edges)
    if model.banned[eos]:
        raise ConfigError(
            f"the data ends its documents with {_token(tokenizer, eos)!r}, which is padding and is never generated",
            "prepare it with another eos_token",
        )
    if bos != tokenizer.bos_token_id:
        tokenizer.bos_token = None if bos is None else _marker(tokenizer, bos)
    if eos != tokenizer.eos_token_id:
        tokenizer.eos_token = _marker(tokenizer, eos)


def _marker(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    token = _token(tokenizer, index)
    if index not in tokenizer.added_tokens_decoder:
        raise ConfigError(
            f"the data begins or ends its documents with {token!r}, an ordinary word of this tokenizer",
            "prepare it with a special token as bos_token and eos_token",
        )
    return token


def _token(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(index))
