"""The small breakages of `mutation_check.py`. A mutant's text must be in its file exactly once: a test holds that."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    """What is broken."""
    file: str
    """Below the package."""
    old: str
    new: str
    tests: tuple[str, ...]
    """Files that must notice it, below the tests' folder."""


def of(file: str, tests: str, *mutants: tuple[str, str, str]) -> list[Mutant]:
    """Mutants (name, old, new) of one file, noticed by the same tests."""
    return [Mutant(name, file, old, new, tuple(tests.split())) for name, old, new in mutants]


MUTANTS: list[Mutant] = [
    *of(
        "diffusion.py",
        "test_diffusion.py",
        (
            "strata are not shuffled",
            "u = (torch.randperm(count, generator=generator) + u) / count",
            "u = (torch.arange(count) + u) / count",
        ),
        ("levels are not stratified", "u = (torch.randperm(count, generator=generator) + u) / count", "u = u * 1.0"),
        ("a chance is not rescaled", "torch.where(hidden, draw / time, (draw - time) / (1.0 - time))", "draw"),
        ("the other half keeps t", "time=(1.0 - view.time).clamp_min(SMALLEST_TIME),", "time=view.time,"),
        (
            "a replacement may be the truth",
            "noise = torch.where(noise == view.clean.cpu(), following, noise)",
            "noise = noise",
        ),
        (
            "weight 1 instead of 1/t",
            "torch.where(view.masked, 1.0 / view.time,",
            "torch.where(view.masked, view.time**0,",
        ),
        (
            "the left shift predicts token 0",
            'return maskable & (position > 0) if shift == "left" else maskable',
            "return maskable",
        ),
        (
            "a turn counts masks as replaced",
            "replaced=view.maskable & ~masked & (draft != view.clean)",
            "replaced=view.maskable & (draft != view.clean)",
        ),
        ("masked tokens are replaced", "chosen = view.kept & (draw < rate)", "chosen = view.maskable & (draw < rate)"),
        ("effects have no boost", "min(1.0, boost * rate)", "rate"),
    ),
    *of(
        "masks.py",
        "test_masks.py",
        (
            "noisy tokens see their own clean block",
            "q_noisy & ~k_noisy & (q_block > k_block)",
            "q_noisy & ~k_noisy & (q_block >= k_block)",
        ),
        ("padding is seen", "same_document &= keys.document[:, None, :] >= 0", "pass"),
        (
            "token-causal is strict",
            "clean = queries.position[:, :, None] >= keys.position[:, None, :]",
            "clean = queries.position[:, :, None] > keys.position[:, None, :]",
        ),
        ("documents see each other", "return allowed & same_document", "return allowed"),
        (
            "noisy blocks see each other",
            "q_noisy & k_noisy & (q_block == k_block)",
            "q_noisy & k_noisy & (q_block >= k_block)",
        ),
    ),
    *of(
        "corruption/input_layout.py",
        "corruption/test_input_layout.py",
        (
            "a block's first token is read from its own noisy half",
            "return torch.where(position % block_size == 0, clean, self.noisy_column.gather(1, before))",
            "return self.noisy_column.gather(1, before)",
        ),
        (
            "one block too few is fed",
            "return answering, block < last[document]",
            "return answering, block + 1 < last[document]",
        ),
    ),
    *of(
        "data/batch.py",
        "data/test_batch.py",
        ("padding begins one token early", "(column > last[piece] + 1)", "(column > last[piece])"),
        ("pieces have no border", "opens[:, 1:] = document[:, 1:] != document[:, :-1]", "opens[:, 1:] = False"),
        ("a row's filling is padding", "return (document >= 0) & (column", "return (document >= -1) & (column"),
    ),
    *of(
        "decoding/base.py",
        "decoding/test_strictness.py",
        ("tau_mask is not strict", "fill = masked & (confidence > tau)", "fill = masked & (confidence >= tau)"),
    ),
    *of(
        "decoding/threshold_edit.py",
        "decoding/test_strictness.py",
        ("tau_edit is not strict", "(confidence > self.tau_edit)", "(confidence >= self.tau_edit)"),
        (
            "max_post is off by one",
            "final |= filled & (checks >= self.max_post)",
            "final |= filled & (checks > self.max_post)",
        ),
        (
            "the safe ending has no budget",
            "spent = ~canvas.masked.any(-1) & (canvas.checks >= self.max_post)",
            "spent = ~canvas.masked.any(-1) & (canvas.checks >= 1000)",
        ),
        (
            "the cautious threshold rises",
            "return self.tau_cautious + mean * (self.tau_mask - self.tau_cautious)",
            "return self.tau_cautious + (1 - mean) * (self.tau_mask - self.tau_cautious)",
        ),
        (
            "its mean is over all tokens",
            "mean = (confidence * canvas.masked).sum(-1, keepdim=True) / masks",
            "mean = confidence.sum(-1, keepdim=True) / masks",
        ),
        (
            "the prompt is edited",
            "write = canvas.editable & (tokens != canvas.tokens)",
            "write = ~canvas.masked & (tokens != canvas.tokens)",
        ),
        ("a fill ends the block", "final = ~had_masks & ~write.any(-1)", "final = ~write.any(-1) | filled"),
    ),
    *of(
        "decoding/base.py",
        "decoding/test_strictness.py",
        (
            "ties go to the highest position",
            "best = confidence.masked_fill(~among, -1.0).argmax(-1, keepdim=True)",
            "best = among.shape[-1] - 1 - confidence.masked_fill(~among, -1.0).flip(-1).argmax(-1, keepdim=True)",
        ),
    ),
    *of(
        "decoding/state.py",
        "test_inference.py",
        (
            "auto commits after an edit",
            "unchanged=not had_masks and not wrote and not closed)",
            "unchanged=not had_masks and not closed)",
        ),
    ),
    *of(
        "decoding/commit.py",
        "test_inference.py",
        (
            "a block too many is committed",
            "row.cache.commit(segment.start + segment.clean, row.tokens)",
            "row.cache.commit(segment.start + segment.clean + self.block, row.tokens)",
        ),
        ("auto commits token-causal blocks", ' and self.clean_mask == "block_causal"', ""),
    ),
    *of(
        "decoding/per_row.py",
        "engine/test_local_engine.py",
        (
            "the engine revises nothing",
            "                decoder.after_block(denoiser, finished)",
            "                pass",
        ),
    ),
    *of(
        "decoding/trajectory.py",
        "decoding/test_trajectory.py",
        ("steps are counted over blocks", "self._steps = 0 if final else self._steps + 1", "self._steps += 1"),
        (
            "edits are told as fillings",
            'taken, place = (each["write"] & each["masked"]).nonzero()',
            'taken, place = each["write"].nonzero()',
        ),
        (
            "an edit tells its old token twice",
            'each["old"][taken, place], each["new"][taken, place])',
            'each["old"][taken, place], each["old"][taken, place])',
        ),
        ("edits are undone in order", "self.edits[::-1]", "self.edits"),
        ("a window is recorded", "if decoder.window > 0:", "if False:"),
    ),
    *of(
        "decoding/base.py",
        "decoding/test_endings.py",
        ("an end behind a mask closes too", "ends &= unwritten.int().cumsum(-1) == 0", "ends &= True"),
        ("the end itself is closed", "(ends.int().cumsum(-1) - ends.int()) > 0", "ends.int().cumsum(-1) > 0"),
        (
            "an edit that takes the end away opens nothing",
            "left = (self.masked if self.shut is None else self.masked | self.shut) & ~write",
            "left = self.masked & ~write",
        ),
        ("what is closed is edited", "return own if self.closed is None else own & ~self.closed", "return own"),
    ),
    *of(
        "decoding/state.py",
        "decoding/test_endings.py",
        ("prompts end a text", "own = self._places >= prompts", "own = self._places >= 0"),
        ("what is behind a limit is filled", "masked = masked if limits is None else masked & ~limits", "pass"),
    ),
    *of(
        "decoding/state.py",
        "decoding/test_reveal.py",
        (
            "a memory outlives its block",
            "row.memory = edit.memory[number] if edit.memory and not final else None",
            "row.memory = edit.memory[number] if edit.memory else None",
        ),
    ),
    *of(
        "decoding/reveal/factor.py",
        "decoding/test_reveal.py",
        ("bounds of the next number", "torch.arange(2, ranked.shape[-1] + 2,", "torch.arange(3, ranked.shape[-1] + 3,"),
    ),
    *of(
        "decoding/reveal/entropy_bound.py",
        "decoding/test_reveal.py",
        ("the highest counts too", "ranked[:, :-1].cumsum(-1)], -1)", "ranked[:, :-1].cumsum(-1)], -1) + ranked"),
    ),
    *of(
        "decoding/reveal/klass.py",
        "decoding/test_reveal.py",
        ("the newest move alone counts", "still.all(-1)", "still[..., -1]"),
        (
            "a new mask has not moved",
            "canvas.masked.shape, self.history), torch.inf)",
            "canvas.masked.shape, self.history), 0.0)",
        ),
    ),
    *of(
        "decoding/reveal/credit.py",
        "decoding/test_reveal.py",
        ("credits do not fade", "credit[masked] * self.beta", "credit[masked]"),
        ("the richest gives way", "held.argmin(-1))[:, None]", "held.argmax(-1))[:, None]"),
    ),
    *of(
        "decoding/reveal/hierarchical.py",
        "decoding/test_reveal.py",
        ("equal ones are all filled", "first &= counted - before == 1", "first &= counted >= 1"),
    ),
    *of(
        "decoding/reveal/card.py",
        "decoding/test_reveal.py",
        ("a written token is a gap", "(passes | ~masked).int().cumprod(-1).bool()", "passes.int().cumprod(-1).bool()"),
    ),
    *of(
        "decoding/base.py",
        "decoding/test_trajectory.py",
        ("recorded without filters", "*self.sampling)", "self.sampling[0])"),
        ("recorded without temperature", "*self.sampling)", "1.0, *self.sampling[1:])"),
        ("laws are computed unasked", "if any(row.recorded for row in canvas.rows):", "if canvas.rows:"),
    ),
    *of(
        "decoding/per_row.py",
        "decoding/test_trajectory.py",
        (
            "a row is recorded with its neighbour's logits",
            "return logits[torch.isin(where.nonzero()[:, 0], rows)], where[rows]",
            "return logits[torch.isin(where.nonzero()[:, 0], rows)].flip(0), where[rows]",
        ),
    ),
    *of(
        "decoding/sequence.py",
        "decoding/test_trajectory.py",
        ("the terminal block is cut", "self.tokens[: self.start].tolist()", "self.tokens[: self.limit].tolist()"),
    ),
    *of(
        "decoding/ordered.py",
        "decoding/test_orders.py",
        ("an order by confidence says nothing", "return ORDERS[self.order].biased", "return False"),
        ("one mask a step", "[:, : self.per_step]", "[:, :1]"),
        ("fixed positions are filled", ".scatter_(-1, first, True) & canvas.masked", ".scatter_(-1, first, True)"),
    ),
    *of(
        "decoding/orders/random_order.py",
        "decoding/test_orders.py",
        ("every block has the same order", "order of the block at {start}", "order of the block"),
        ("every row has the same order", "seed {seed}", "seed"),
        ("keys are the draws of tokens", 'int.from_bytes(digest[:8], "big") >> 1', "seed"),
    ),
    *of(
        "decoding/orders/confidence.py",
        "decoding/test_orders.py",
        ("the least sure comes first", "return -confidence", "return confidence"),
    ),
    *of(
        "engine/local.py",
        "engine/test_weights_changed.py",
        ("old prefixes are kept", "prefixes.shrink(0)", "pass"),
        (
            "weights change under requests",
            "            if self._live:\n                raise EngineBusy",
            "            if False:\n                raise EngineBusy",
        ),
        ("answers do not say their weights", "weights=self.weights,", ""),
    ),
    *of(
        "engine/local_models.py",
        "engine/test_weights_changed.py",
        ("packed weights change", "any(isinstance(part, PackedLinear) for part in first.causal_lm.modules())", "False"),
    ),
    *of(
        "engine/runners.py",
        "engine/test_local_engine.py",
        (
            "a prefix comes without its last hidden state",
            "row.last_clean_hidden[: blocks + 1] = prefix.last_clean_hidden[: blocks + 1]",
            "pass",
        ),
        ("the parent reads the first token of a piece", "last.append(end - 1)", "last.append(end - len(tokens))"),
        (
            "every request to the parent has the same seed",
            "request.generator = torch.Generator().manual_seed(spec.seed)",
            "request.generator = torch.Generator().manual_seed(0)",
        ),
    ),
    *of(
        "models/sampling.py",
        "decoding/test_decoding.py",
        (
            "the nucleus has one more",
            "ordered.cumsum(-1) - ordered >= top_p",
            "ordered.cumsum(-1) - ordered > top_p",
        ),
        ("the nucleus has one fewer", "ordered.cumsum(-1) - ordered >= top_p", "ordered.cumsum(-1) >= top_p"),
        (
            "every equal of the k-th is kept",
            "level.cumsum(-1) <= k - above.sum(-1, keepdim=True)",
            "level.cumsum(-1) <= k",
        ),
    ),
    *of(
        "kv_cache/block_cache.py",
        "kv_cache/test_prefix_cache.py kv_cache/test_kv_cache.py",
        ("two clean blocks have no mask", "one_block = segment.clean <= cache.block_size and", "one_block = True or"),
        ("restore does nothing", "self.keys[:, :, begin:end], self.values[:, :, begin:end] = kept", "pass"),
        ("adopted values are forgotten", "self.values[:, :, :length] = other.values[:, :, :length]", "pass"),
        ("truncating keeps the hashes", "del self._hashes[length // self.block_size :]", "pass"),
    ),
    *of(
        "kv_cache/prefix_cache.py",
        "kv_cache/test_prefix_cache.py",
        ("a block's hash forgets its past", "hashlib.sha256(before + array(", "hashlib.sha256(array("),
        ("the store grows over its limit", "self.shrink(self.limit_bytes - size)", "pass"),
        (
            "what was used last goes first",
            "self._prefixes.move_to_end(keys[-1])",
            "self._prefixes.move_to_end(keys[-1], last=False)",
        ),
        (
            "the shortest prefix is found",
            "for blocks in range(len(chain), 0, -1):",
            "for blocks in range(1, len(chain) + 1):",
        ),
    ),
    *of(
        "losses/base.py",
        "losses/test_loss_weights.py",
        ("a mean is over the tokens that are no targets", "    chosen = chosen & targets\n", ""),
    ),
    *of(
        "losses/token_to_token.py",
        "losses/test_loss_weights.py",
        ("a kept share is not reweighted", "else chosen.float() / self.keep_share)", "else chosen.float())"),
    ),
    *of(
        "losses/distillation.py",
        "losses/test_loss_weights.py",
        (
            "the parent has a say about the first token",
            "targets & (view.position > 0), self.weight",
            "targets, self.weight",
        ),
        ("the KL forgets 1/t", "elbo_weight(view) if self.elbo else view.masked.float()", "view.masked.float()"),
    ),
    *of(
        "losses/objective.py",
        "losses/test_loss_weights.py losses/test_losses.py",
        (
            "a draft ignores tau_mask",
            "write = ~view.masked[where] | (confidence > tau_mask)",
            "write = ~view.masked[where] | (confidence > 0)",
        ),
        (
            "the teacher is a place late",
            "teacher_hidden[row, (place - 1).clamp_min(0)]",
            "teacher_hidden[row, place]",
        ),
    ),
    *of(
        "losses/c2dlm.py",
        "losses/test_c2dlm.py",
        (
            "rows do not stop at alpha",
            "((causes + eps) / (others + eps)).log()).clamp_min(0.0)",
            "((causes + eps) / (others + eps)).log())",
        ),
        (
            "the weight does not decay",
            "return self.lambda_c * max(0.0, (1.0 - progress) / (1.0 - self.decay_from))",
            "return self.lambda_c",
        ),
    ),
    *of(
        "losses/linear_log_probs.py",
        "likelihood/test_likelihoods.py",
        (
            "banned ids have probability",
            '(logits / temperature).masked_fill(banned, float("-inf"))',
            "logits / temperature",
        ),
    ),
    *of(
        "likelihood/base.py",
        "likelihood/test_likelihoods.py likelihood/test_held_out.py",
        ("draws do not share out the levels", ".argsort(0)\n", ".argsort(0) * 0 + self.draws // 2\n"),
        (
            "every block's draws have one order",
            "strata = torch.rand(self.draws, count, generator=generator).argsort(0)",
            "strata = torch.rand(self.draws, count, generator=generator)[:, :1].argsort(0).expand(-1, count)",
        ),
        ("a document's first token is scored", "return batch.maskable & (batch.position > 0)", "return batch.maskable"),
        (
            "what is hidden is shown",
            "shown_as_mask = masked if batch.always_masked is None else masked | batch.always_masked",
            "hidden = masked",
        ),
        ("a pair is summed", "return DrawLosses(nll / len(noising),", "return DrawLosses(nll,"),
        (
            "ranks go on over blocks",
            "ranks[order] = torch.arange(len(order)) - first",
            "ranks[order] = torch.arange(len(order))",
        ),
    ),
    *of(
        "likelihood/count.py",
        "likelihood/test_held_out.py",
        ("one mask more", "(level * sizes).floor() + 1", "(level * sizes).floor() + 2"),
    ),
    *of(
        "likelihood/coupled.py",
        "likelihood/test_held_out.py",
        ("nothing is ever all masked", "k = (level * (sizes + 1)).floor()", "k = (level * sizes).floor()"),
    ),
    *of(
        "likelihood/time.py",
        "likelihood/test_held_out.py",
        ("weight 1", "return [(masked, 1.0 / time)]", "return [(masked, time**0)]"),
    ),
    *of(
        "likelihood/held_out.py",
        "likelihood/test_held_out.py",
        ("padding is counted", "counted = scored & ~padding", "counted = scored"),
        ("a bound leaves the padding out", 'self.padding_nll if self.kind == "bound" else 0.0', "0.0"),
    ),
    *of(
        "likelihood/conditional.py",
        "likelihood/test_conditional.py",
        ("losses have no weight", "weights += [n / k] * k", "weights += [1.0] * k"),
        ("what comes behind is shown", "noisy[row, unit.length :] = mask_id", "pass"),
    ),
    *of(
        "grading/gsm8k.py",
        "grading/test_gsm8k_grading.py",
        (
            "canonical reads any number of digits",
            'len(number.group()) - number.group().count(".") > MOST_DIGITS',
            "False",
        ),
        ("two answers are well formed", 'text.count("####") == 1', 'text.count("####") >= 1'),
        ("a full stop counts", 'return text.removesuffix(".").lower()', "return text.lower()"),
        ("any number may earn a reward", 'if self.rule == "flexible":', "if False:"),
        ("a second sign is ignored", "if not match or (match.group(1) and match.group(2)):", "if not match:"),
    ),
    *of(
        "grading/code.py",
        "grading/test_code_grading.py",
        (
            "the sandbox's failures are punished",
            'return None if verdict.kind == "sandbox_error" else float(verdict.passed)',
            "return float(verdict.passed)",
        ),
        ("any block replaces the prompt", "if not defines(block, name):", "if False:"),
    ),
    *of(
        "grading/math_answers.py",
        "eval/test_task_scores.py",
        (
            "the first box is read",
            'max(text.rfind("\\\\boxed"), text.rfind("\\\\fbox"))',
            'max(text.find("\\\\boxed"), text.find("\\\\fbox"))',
        ),
        (
            "entries may be missing",
            "return len(ours) == len(theirs) and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))",
            "return all(_same(a, b) for a, b in zip(ours, theirs))",
        ),
    ),
    *of(
        "grading/sandbox/checker.py",
        "grading/test_sandbox_guards.py",
        ("processes left over are ignored", 'elif end.get("left"):', "elif False:"),
        (
            "so are they where the worker ended itself",
            'if self.started is None or end.get("left"):',
            "if self.started is None:",
        ),
        (
            "the checker stays dumpable",
            'kernel.prctl("not dumpable", kernel.PR_SET_DUMPABLE, 0)  # /proc',
            "pass  # /proc",
        ),
        ("a test's prints reach the verdict", "os.dup2(os.open(os.devnull, os.O_RDWR), 1)", "pass"),
        (
            "BaseException kinds are raised in the test",
            "isinstance(kind, type) and issubclass(kind, Exception)",
            "isinstance(kind, type) and issubclass(kind, BaseException)",
        ),
        (
            "a worker that is not locked down is trusted",
            'if message.get("ready") != self.job["mechanisms"]:',
            "if False:",
        ),
    ),
    *of(
        "grading/sandbox/checker.py",
        "grading/test_sandbox.py",
        ("any message id is an answer", 'if type(reply.get("id")) is not int or reply["id"] != number:', "if False:"),
    ),
    *of(
        "grading/sandbox/restrict.py",
        "grading/test_sandbox_guards.py",
        ("the filter is not installed", "seccomp.install(may_write=private)", "pass"),
        ("Landlock is not installed", 'landlock.install([*readable, "/dev/null", settings["folder"]], hidden)', "pass"),
        ("there is no root of its own", "build_root(readable, hidden)", "pass"),
        (
            "the worker stays dumpable",
            'kernel.prctl("not dumpable", kernel.PR_SET_DUMPABLE, 0)  # a crash',
            "pass  # a crash",
        ),
        ("descriptors stay open", "os.closerange(PRIVATE_FDS[-1] + 1, 256)", "pass"),
        ("memory has no limit", '"AS": limits["memory_bytes"],', ""),
    ),
    *of(
        "grading/sandbox/run.py",
        "grading/test_sandbox_guards.py",
        ("the environment is handed on", "    return ENVIRONMENT\n", "    return dict(os.environ)\n"),
    ),
    *of(
        "grading/sandbox/launcher.py",
        "grading/test_sandbox_parts.py",
        ("nothing is killed that is left over", "left = 0 if alone else _clear(child)", "left = 0"),
    ),
    *of(
        "grading/sandbox/channel.py",
        "grading/test_sandbox_parts.py",
        ("any nonce will do", "if nonce != self.nonce:", "if False:"),
    ),
    *of(
        "grading/sandbox/seccomp.py",
        "grading/test_sandbox_parts.py",
        (
            "processes may be made",
            "argument(0, [_THREAD_FLAG], _NAMESPACE_FLAGS | _THREAD_FLAG)",
            "argument(0, [0], 0)",
        ),
        ("other processes may be signalled", '"kill": [argument(0, [own_pid])],', '"kill": [argument(0, [0], 0)],'),
    ),
    *of(
        "recipe.py",
        "stages/test_resolution.py",
        (
            "a training has no seed of the run",
            'below = {"seed": self.seed, "device": self.device, "train": {"precision": self.precision}}',
            'below = {"device": self.device, "train": {"precision": self.precision}}',
        ),
        (
            "the run's keys win over the section's",
            "return merge(below, section)",
            "return merge(section, below)",
        ),
        (
            "a verb takes no overrides of its entry",
            "section = _resolved(run, table, stage, overrides)\n    section = section if",
            "section = _resolved(run, table, stage, {})\n    section = section if",
        ),
        (
            "names of a run are not checked",
            "own = {key: value for key, value in run.items() if key not in sections}",
            "own = {key: value for key, value in run.items() if key in vars(RunConfig())}",
        ),
    ),
    *of(
        "data/overlap.py",
        "data/test_overlap.py",
        ("copies count once", "count = sum(digest in seen for _, digest in held)", "count = len(seen)"),
    ),
    *of(
        "corruption/anchors.py",
        "losses/test_draft.py",
        (
            "a shown token is learnt all the same",
            "learnt=groups.learnt & ~settled, shown=shown",
            "learnt=groups.learnt, shown=shown",
        ),
    ),
    *of(
        "losses/draft.py",
        "losses/test_draft.py",
        (
            "a row that shows a token starts as a mask",
            "return torch.where((shown >= 0)[..., None], tokens, anchors)",
            "return anchors",
        ),
        ("drafts behind a wrong one are kept", ".int().cumprod(-1).bool()", ""),
    ),
    *of(
        "models/drafter.py",
        "losses/test_draft.py",
        (
            "a layer computed again is the parent's",
            "with self.gate.after(clean):  # in here",
            "with self.gate.after(EVERY_ROW if torch.is_grad_enabled() and self.recomputes else clean):  # in here",
        ),
    ),
    *of(
        "models/attention/kept.py",
        "losses/test_draft.py",
        ("the few groups see one clean row less", "int(part.max()) + 1 for part", "int(part.max()) for part"),
    ),
    *of(
        "trainer/draft_validation.py",
        "trainer/test_draft_validation.py",
        ("groups that are cut short count", "whole = groups.learnt.all(-1)", "whole = groups.learnt.any(-1)"),
    ),
    *of(
        "drafts_stage0.py",
        "test_drafts_stage0.py",
        ("the last checkpoint is kept, not the best", '"tokens_per_forward", highest=True)', '"tokens_per_forward")'),
        ("a run's length is counted in tokens", 'unit="mask_positions",', 'unit="tokens",'),
    ),
]
