"""What dInfer gives back, in our terms: the answer alone, its length, and why it ended."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hildanext.decode.transcript import Ending, Transcript
from hildanext.engines.base import EngineFailed


def ending_of(
    whole: Sequence[int], prompt: Sequence[int], most: int, tokenizer: Any, mask_id: int, stop: Sequence[str]
) -> Ending:
    """The answer in a row that dInfer returned, cut to `most` tokens and before the first stop string.

    dInfer writes whole blocks, and takes every end of text out of a single row, those of the prompt too: a row that
    is shorter than was asked for ended by itself. What it wrote behind an end of text in the same block cannot be told
    from the answer then. Raises `EngineFailed` where the prompt does not come back, and for masks that are left.
    """
    eos = int(tokenizer.eos_token_id)
    without = [token for token in prompt if token != eos]
    kept = list(prompt) if list(whole[: len(prompt)]) == list(prompt) else without
    if list(whole[: len(kept)]) != kept:
        raise EngineFailed("dinfer gave another prompt back", "is it the version that the adapter knows?")
    written = list(whole[len(kept) :])[:most]
    ending = Transcript(tokenizer, frozenset({eos}), stop).add(written, full=True)
    assert ending is not None
    if mask_id in ending.tokens:
        raise EngineFailed("dinfer left masks in its text", "is engine.mask_id the model's?")
    if ending.reason == "length" and len(written) < most:
        return replace(ending, reason="eos")
    return ending
