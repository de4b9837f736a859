"""The peak of an alignment: rounds of writing answers, and the step that learns of them, which have room in turn.

While answers are written there are the weights, the optimiser's states unless they rest elsewhere, keys and values of
the answers, and a forward over two blocks of each, or the logits of what it is to fill. In the update these keys and
values are gone, and it is a step as of fine-tuning whose rows are packed groups; of several looks all graphs may live
at once.
"""

from dataclasses import replace
from math import ceil

from hildanext.decoding import Ordered, make_decoder
from hildanext.kv_cache.block_cache import whole_stretches
from hildanext.memory_plan.architecture import Architecture
from hildanext.memory_plan.layer import FLOAT, Feed, learning
from hildanext.memory_plan.step import (
    PARTS,
    Case,
    Peak,
    RolloutCase,
    kept_parts,
    peak_of,
    standing_parts,
    training_moments,
    weights_bytes,
)
from hildanext.models.attention.branched import WORTH_WHILE
from hildanext.rl.config import RlConfig, Seams
from hildanext.rl.likelihoods.block_elbo import BlockElbo
from hildanext.rl.likelihoods.trajectory import TrajectoryLikelihood

PROMPT = 128
"""Tokens of a prompt where nobody says how many."""
READ, WRITTEN = 20, 24
"""Bytes of a logit while a token is drawn of it, and while it is told how likely one was: in fp32 itself, over the
temperature and as a probability, and that and its sum in fp64."""
LOGITS = 4
"""Copies of a chunk's logits that live at once in its backward pass: themselves, masked ones, and two gradients."""
ARRAYS = 60
"""Bytes of a position in a round's arrays."""
LOOK = 26
"""Bytes of a position in a look and in what is known of it, of old and reference."""


def alignment_case(
    config: RlConfig, seams: Seams, shape: Architecture, block: int, prompt: int, narrow: int, on_cpu: bool
) -> Case:
    """The step of an alignment, and its rollouts. All prompts have `prompt` tokens, all answers what they may have."""
    answer, group, groups = seams.rollouts.max_new_tokens, config.group, config.train.batch_size
    begin, end = prompt // block * block, -(-(prompt + answer) // block) * block
    noisy, clean = end - begin, end - block - begin
    if config.packed:
        feed = Feed(groups, group * noisy, begin + group * clean, block, True)
        apart = replace(feed, branches=group, shared=begin)
        rows, _, own_clean, seen = apart.attended
        scores = rows * (noisy + own_clean) * seen + groups * begin * begin
        feed = apart if WORTH_WHILE * scores <= feed.tokens * feed.clean else feed
    else:
        feed = Feed(groups * group, noisy, begin + clean, block, True)
    looks = looks_of(seams, block)
    graphs = 1 if seams.objective.separable else looks
    micro_batches = ceil(config.problems_per_round / groups) * (looks // graphs)
    written = config.problems_per_round * group
    measured = config.measure.problems * max(config.measure.samples, 1)
    slots = min(seams.rollouts.together, max(written, measured))
    cache = getattr(seams.rollouts, "cache_mib", None)
    read, filled = _logits_of(seams, block, on_cpu)
    rollouts = RolloutCase(
        slots=slots if seams.rollouts.traced or cache is not None else 0,
        kept=max(min(seams.rollouts.together, written), measured) * whole_stretches(end),
        cache_bytes=None if cache is None else cache * 2**20 * whole_stretches(end) // end,
        context=end,
        read=read,
        filled=filled,
        graphs=graphs,
        reference=seams.objective.wants_reference,
        arrays=written * end * (ARRAYS + LOOK * looks * config.updates),
    )
    return Case(
        shape=shape,
        feed=feed,
        how=learning(config.lora, config.quantize is not None, narrow),
        chunk=config.train.chunk,
        supervised=groups * group * answer,
        teacher="none",
        eight_bit=config.train.optimizer == "adamw8bit",
        recompute=config.train.gradient_checkpointing,
        resting=config.train.offload is not None,
        several=micro_batches > 1,
        on_cpu=on_cpu,
        rollouts=rollouts,
    )


def ordered_of(seams: Seams) -> Ordered | None:
    """The decoder of the rollouts where it fills a number of masks that is known; None for any other."""
    section = getattr(seams.rollouts, "section", None)
    decoder = None if section is None else make_decoder(section(seams.rollouts.temperature))
    return decoder if isinstance(decoder, Ordered) else None


def _logits_of(seams: Seams, block: int, on_cpu: bool) -> tuple[int, int]:
    """Positions of an answer whose logits a forward makes, and how many of them it may fill."""
    decoder = ordered_of(seams)
    if decoder is None:
        return block, block
    filled = min(decoder.per_step, block)
    return (block if decoder.biased or not on_cpu else filled), filled


def looks_of(seams: Seams, block: int) -> int:
    """Forwards that an estimate takes of a micro-batch."""
    likelihood = seams.likelihood
    if isinstance(likelihood, BlockElbo):
        return 2 * likelihood.draws
    if not isinstance(likelihood, TrajectoryLikelihood):
        return 1
    if likelihood.segments is not None:
        return likelihood.segments
    steps = ceil(block / getattr(seams.rollouts, "per_step", 1))
    return steps if likelihood.steps == "all" else likelihood.steps


def alignment_peak(case: Case, framework: int) -> Peak:
    """The peak in bytes; its moment says whether the rollouts or the update decide."""
    assert case.rollouts is not None, "a case of an alignment has rollouts"
    standing = {part: 0 for part in (*PARTS, "cache")} | standing_parts(case)
    if case.rollouts.reference and case.how.rank is None:
        standing["reference"] = weights_bytes(case.shape, case.how.packed, case.frozen)
    moments = {"rollouts": _rollouts(case, case.rollouts)}
    update = training_moments(replace(case, rollouts=None), 0)
    del update["loss"]
    update["loss"] = _loss(case, case.rollouts)
    more = _times(kept_parts(case, case.shape.layers), case.rollouts.graphs - 1)
    for part, size in more.items():
        update["backward begins"][part] = update["backward begins"].get(part, 0) + size
    for name, parts in update.items():
        own = standing_parts(case) if name != "loss" else {}
        moments[f"update: {name}"] = {part: parts.get(part, 0) - own.get(part, 0) for part in PARTS}
    for name, parts in moments.items():
        moments[name] = {part: size + parts.get(part, 0) for part, size in standing.items()}
        moments[name]["framework"] += framework
        moments[name]["activations"] += case.rollouts.arrays if case.on_cpu else 0
        if case.resting and name != "update: step":
            moments[name]["optimizer"] = 0
    return peak_of(moments)


def _rollouts(case: Case, rollouts: RolloutCase) -> dict[str, int]:
    """Beside the weights; in fp32, whatever an update computes in. The finished block is fed with the next one, and
    all answers may finish one at once; what is read of their states is read when these are gone."""
    if rollouts.slots == 0:  # another engine writes
        return {}
    shape, slots = case.shape, rollouts.slots
    of_a_token = 2 * shape.layers * shape.key * FLOAT
    running = slots * whole_stretches(rollouts.context) * of_a_token
    cache = max(running, rollouts.kept * of_a_token)
    cache = cache if rollouts.cache_bytes is None else min(cache, rollouts.cache_bytes)
    stream = 4 * shape.hidden + max(3 * shape.inner, 3 * shape.query + 2 * shape.key)
    forward = 2 * slots * case.feed.block * stream * FLOAT
    read, filled = rollouts.read, rollouts.filled
    logits = slots * shape.vocab * max(READ * read, FLOAT * (read - filled) + WRITTEN * filled)
    return {"cache": cache, **({"activations": forward} if forward > logits else {"logits": logits})}


def _loss(case: Case, rollouts: RolloutCase) -> dict[str, int]:
    """The backward pass of the log-probabilities: every graph is kept, and a chunk of logits is computed again."""
    shape, how, rows = case.shape, case.how, case.supervised
    parts = _times(kept_parts(case, shape.layers), rollouts.graphs)
    parts["activations"] += rollouts.graphs * (case.feed.tokens + 2 * rows) * shape.hidden * FLOAT
    parts["logits"] = LOGITS * min(case.chunk, rows) * shape.vocab * FLOAT
    parts["copies"] = parts.get("copies", 0) + (shape.embedding * how.narrow if how.narrow < case.frozen else 0)
    head = 0 if case.has_frozen_head else 2 * shape.embedding * FLOAT
    parts["gradients"] = head + (case.learning * FLOAT if case.several else 0)
    return parts


def _times(parts: dict[str, int], count: int) -> dict[str, int]:
    return {part: count * size for part, size in parts.items()}
