"""Drafts without training: what followed the last time the text's last tokens stood there (prompt look-up)."""

from collections.abc import Sequence

LONGEST = 4
"""Tokens of a match at most. Longer matches are rare, and what follows them differs no less often."""


def look_up(tokens: Sequence[int], count: int, shortest: int = 1) -> list[int]:
    """At most `count` tokens that followed the latest earlier place of the longest end of `tokens`, of at least
    `shortest` tokens; none where there is no such place.

    Source: prompt look-up decoding, as Transformers' `prompt_lookup_num_tokens` and vLLM's `ngram` do it.
    """
    size = len(tokens)
    for length in range(min(LONGEST, size - 1), shortest - 1, -1):
        end = list(tokens[size - length :])
        for begin in range(size - length - 1, -1, -1):
            if tokens[begin] == end[0] and list(tokens[begin : begin + length]) == end:
                return list(tokens[begin + length : begin + length + count])
    return []
