"""lm-evaluation-harness's model type `hilda`; started as a program, the harness's own command line with it.

python -m hildanext.eval.lm_harness run --model hilda --model_args model=my-checkpoint,mode=Q_MODE --tasks gsm8k
python -m hildanext.eval.lm_harness run --model hilda --model_args tau_mask=0.6,decoder.window=1 --tasks gsm8k

The adapter asks the same two questions as our own tasks (`eval.models`): prompts are answered in batches, and
likelihoods are exact at block size 1 and bounds elsewhere. The package `lm-eval` is the extra `eval`; without it the
adapter is refused with one line, and everything else works.
"""

import json
import logging
import sys
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hildanext.core.errors import ConfigError, HildaError, UnknownChoice
from hildanext.core.registry import choose_profile
from hildanext.core.runtime import RuntimeConfig
from hildanext.data.chat_template import Message, chat_text, warn_without_header
from hildanext.data.control_tokens import find_marks
from hildanext.decoding import decoder_section, make_decoder
from hildanext.eval.models import EvalAnswer, EvalModel, GenerationParams, ModelPair
from hildanext.eval.tasks.base import split_at
from hildanext.likelihood.conditional import Pair

MODEL_TYPE = "hilda"
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the number of new tokens, in the harness's order of precedence."""
SUBJECTS = ("diffusion", "parent")
HARNESS_DEVICE = "cuda:0"

logger = logging.getLogger(__name__)


class HarnessAdapter:
    """The harness's three requests, answered by a `EvalModel` that writes and one that scores.

    `is_greedy` is always reported False, as other diffusion adapters do: finding out takes a forward per token.
    Contexts that are too long lose their beginning, as the harness's own models do it.
    """

    cache_hook: Any = None

    def __init__(
        self, writer: EvalModel, scorer: EvalModel, batch_size: int = 8, max_gen_toks: int = 256, seed: int = 0
    ) -> None:
        self.writer, self.scorer = writer, scorer
        self.tokenizer = writer.tokenizer
        self.batch_size, self.max_gen_toks, self.seed = batch_size, max_gen_toks, seed

    # ------------------------------------------------------------------ requests

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts, each cut before the first of its stop strings. Requests with the same settings share batches."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            params = self._params(requests[indices[0]].args[1])
            longest = self.writer.context - params.max_new_tokens
            if longest < 1:
                raise ConfigError(
                    f"{params.max_new_tokens} new tokens leave no room in the context of {self.writer.context}",
                    "lower the task's max_gen_toks (--gen_kwargs), or eval.harness.max_gen_toks",
                )
            prompts = {index: self.writer.encode(requests[index].args[0])[-longest:] for index in indices}
            order = sorted(indices, key=lambda index: (-len(prompts[index]), index))
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]

                def hand(row: int, answer: EvalAnswer, batch: Sequence[int] = batch) -> None:
                    texts[batch[row]] = answer.text
                    self._remember("generate_until", requests[batch[row]].args, answer.text)

                seeds = [self.seed + index for index in batch]
                self.writer.write([prompts[index] for index in batch], params, seeds, hand)
        return texts

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, False) of every continuation. Continuations of one context share their random masks."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            before, after = self._prefix(), self._ids(continuation)
            if context:
                before, after = split_at(self.scorer.encode, context, continuation)
            elif after[:1] == before:
                before, after = after[:1], after[1:]
            pairs.append(self._pair(before, after, zlib.crc32(context.encode())))
        scored = [(-score.nats, False) for score in self.scorer.score(pairs, self.batch_size)]
        for request, score in zip(requests, scored, strict=True):
            self._remember("loglikelihood", request.args, score)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts; a text longer than the context is scored in disjoint windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owners = [], []
        for index, request in enumerate(requests):
            ids, (prefix,) = self._ids(request.args[0]), self._prefix()
            windows = get_rolling_token_windows(ids, prefix, self.scorer.context - 1, 1)
            for before, after in map(make_disjoint_window, windows):
                pairs.append(Pair(tuple(before), tuple(after), zlib.crc32(str(after[:8]).encode())))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.scorer.score(pairs, self.batch_size), strict=True):
            totals[owner] -= score.nats
        for request, total in zip(requests, totals, strict=True):
            self._remember("loglikelihood_rolling", request.args, total)
        return totals

    # ------------------------------------------------------------------ chat

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = self.tokenizer.chat_template
        return template if chat_template and isinstance(template, str) else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt the last turn stays open, to be continued.

        The harness hands the text back, and then control tokens that a message spells cannot be told from the
        template's: they are parsed, which is said.
        """
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        text = chat_text(self.tokenizer, messages, answer=add_generation_prompt)
        warn_without_header(self.tokenizer)
        marks = find_marks(self.tokenizer, messages)
        if marks is not None:
            logger.warning("a message spells %s, which is parsed as such here", ", ".join(marks.letters))
        if add_generation_prompt:
            return text
        last = messages[-1].content.strip()
        return text[: text.rindex(last) + len(last)]

    # ------------------------------------------------------------------ processes

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank() if together() else 0

    @property
    def world_size(self) -> int:
        return torch.distributed.get_world_size() if together() else 1

    @property
    def device(self) -> torch.device:
        return self.writer.network.device

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if not together():
            return tensor
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if not together():
            return [obj]
        parts: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        if together():
            torch.distributed.barrier()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness keeps beside its results."""
        network = self.writer.network
        return {
            "hilda": {"writes": self.writer.settings, "scores": self.scorer.settings},
            "model_dtype": str(network.dtype),
            "model_num_parameters": sum(part.numel() for part in network.parameters()),
        }

    # ------------------------------------------------------------------ details

    def _params(self, settings: Mapping[str, Any]) -> GenerationParams:
        """A task's generation settings. Raises `ConfigError` for one that decoding does not have."""
        left = dict(settings)
        lengths = [left.pop(name) for name in LENGTH_NAMES if name in left]
        lengths = [int(length) for length in lengths if length is not None]
        until = left.pop("until", None) or []
        sampled = left.pop("do_sample", None)
        temperature = float(left.pop("temperature", None) or 0.0)
        top_p = left.pop("top_p", None)
        if left:
            known = ", ".join(("until", "do_sample", "temperature", "top_p", *LENGTH_NAMES))
            raise ConfigError(f"the task asks for {', '.join(sorted(left))}", f"known generation settings: {known}")
        return GenerationParams(
            max_new_tokens=lengths[0] if lengths else self.max_gen_toks,
            stops=(until,) if isinstance(until, str) else tuple(stop for stop in until if stop),
            temperature=0.0 if sampled is False else temperature,
            top_p=None if top_p is None else float(top_p),
        )

    def _pair(self, before: Sequence[int], after: Sequence[int], seed: int) -> Pair:
        longest = self.scorer.context - len(after)
        return Pair(tuple(before[-longest:] if longest > 0 else before), tuple(after), seed)

    def _prefix(self) -> list[int]:
        """What an empty context is: BOS, else EOS, which separates documents."""
        first = self.tokenizer.bos_token_id
        return [int(first if first is not None else self.tokenizer.eos_token_id)]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _remember(self, kind: str, request: Any, answer: Any) -> None:
        if self.cache_hook is not None:
            self.cache_hook.add_partial(kind, request, answer)


def together() -> bool:
    """Whether this is one of several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def adapter_class() -> type:
    """The adapter as a model class of the harness; registers it as `hilda`. Raises `ConfigError` without lm-eval."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import model_registry, register_model
    except ModuleNotFoundError:
        raise ConfigError("lm-evaluation-harness is not installed", 'pip install "hildanext[eval]"') from None
    if MODEL_TYPE in model_registry:
        return model_registry.get(MODEL_TYPE)  # type: ignore[no-any-return]

    class Hilda(HarnessAdapter, LM):
        """`--model hilda`; its arguments are those of `from_arguments`."""

        def __init__(self, **arguments: Any) -> None:
            LM.__init__(self)
            HarnessAdapter.__init__(self, **(arguments if "writer" in arguments else from_arguments(**arguments)))

    return register_model(MODEL_TYPE)(Hilda)  # type: ignore[no-any-return]


def from_arguments(
    model: str = "tiny",
    parent: str | None = None,
    subject: str = "diffusion",
    mode: str | None = None,
    decoder: str | None = None,
    profile: str = "SAFE",
    block_size: int | None = None,
    draws: int = 16,
    max_gen_toks: int = 256,
    batch_size: int | str = 8,
    max_batch_size: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    **knobs: Any,
) -> dict[str, Any]:
    """`--model_args` to the adapter's parts. `subject` is diffusion or parent; `block_size` is that of likelihoods.

    All others are knobs of the decoder, with or without `decoder.` before them: decoder=NAME,decoder.KNOB=VALUE.
    Raises `ConfigError` for a knob that the decoder does not have, and a batch size that does not exist;
    `UnknownChoice` for names.
    """
    from hildanext.eval.task_session import open_pair

    if subject not in SUBJECTS:
        raise UnknownChoice("subject", subject, SUBJECTS)
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ConfigError(f"batch_size {batch_size!r}", "give a number")
    choose_profile({"profile": profile})  # of the whole evaluation
    named = {"name": decoder} if decoder is not None else {}
    section = decoder_section(mode, None, named, **{key.removeprefix("decoder."): knobs[key] for key in knobs})
    make_decoder(section)
    name = model if subject == "diffusion" else None
    other = "" if subject == "diffusion" else parent if parent is not None else model
    pair, _ = open_pair(name, other, RuntimeConfig(_usual_device(device), dtype, threads))
    writer, scorer = subjects(pair, section, block_size, draws)[subject]
    return {
        "writer": writer,
        "scorer": scorer,
        "batch_size": int(batch_size),
        "max_gen_toks": int(max_gen_toks),
        "seed": int(seed),
    }


def _usual_device(device: str | None) -> str:
    """The harness names cuda:0 where its user names nothing; without CUDA that is whatever is here, and we say so."""
    if device == HARNESS_DEVICE and not torch.cuda.is_available():
        logger.warning("the harness's default device %s is not there: taking another", device)
        return "auto"
    return device if device is not None else "auto"


def subjects(
    pair: ModelPair, decoder: Mapping[str, Any], block_size: int | None, draws: int
) -> dict[str, tuple[EvalModel, EvalModel]]:
    """Who can be asked: the parent and the diffusion model, each as one that writes and one that scores."""
    models: dict[str, tuple[EvalModel, EvalModel]] = {}
    for parent in pair.parent_models():
        models["parent"] = (parent, parent)
    if pair.model is not None:
        writer = pair.writing({str(decoder["name"]): decoder})[-1]
        models["diffusion"] = (writer, pair.scoring((block_size,), draws)[-1])
    return models


def main() -> int:
    """The harness's own command line, with `--model hilda` in it."""
    try:
        adapter_class()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except HildaError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
