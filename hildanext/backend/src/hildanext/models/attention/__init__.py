"""The rule `hildanext.masks.may_attend` as it is executed, which is done in three ways.

`dense` computes any boolean mask at once; `blockwise` a training input of noisy and clean copies, of whose scores three
quarters are empty and the half is never computed; `kv_cache.CachedAttention` a forward of decoding, where the slots
that it reads are the rule. `test/kv_cache/test_three_executions.py` holds them equal. `branched` computes continuations
of one beginning, each by itself (`test/rl/test_rl_packed.py`).
"""

PREFILL_TOKENS = 1024
"""Tokens of one document's prompt that a forward is fed at most. A mask over n of them has n times as many cells as the
document so far, a few megabytes here. Where others wait meanwhile less is fed: the engine has a smaller budget
(`engine.prefill_tokens`), which all prompts that join share."""
