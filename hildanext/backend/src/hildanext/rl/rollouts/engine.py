"""Answers of our own engine, in this process: all slots in one forward, a group's prompt fed once."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import CheckpointError, ConfigError
from hildanext.core.registry import under_profile
from hildanext.decoding import make_decoder
from hildanext.engine.base import Request, RequestOutput
from hildanext.engine.local import LocalEngine, LocalEngineConfig
from hildanext.rl.batch import Answer
from hildanext.rl.policy import Policy
from hildanext.rl.rollouts.asking import ask_all
from hildanext.rl.rollouts.base import Ids, Rollouts, Wish


@config
class EngineRollouts(Rollouts):
    """`order` and `per_step` are those of the decoder `ordered`; with `decoder` another one writes.

    Recorded log p is the action's in random order and from left to right; see `decoding.ordered`.
    """

    fills: ClassVar[bool] = True

    order: Literal["random", "left_to_right", "confidence"] = "random"
    per_step: int = Field(default=1, ge=1)
    """Masks of a block that a forward fills."""
    decoder: dict[str, Any] | None = None
    """Section of another decoder, such as `{"name": "threshold_edit", "tau_mask": 0.7, "tau_edit": null}`."""
    slots: int = Field(default=64, ge=1)
    """Answers that are written together."""
    cache_mib: int | None = Field(default=None, ge=1)
    """Keys and values of all of them; None: a quarter of the memory that is free at the start."""

    def __post_init__(self) -> None:
        if self.decoder is not None and "temperature" in self.decoder:
            raise ConfigError("rl.rollouts.decoder names a temperature", "give it as rl.rollouts.temperature")
        make_decoder(self.section(self.temperature))

    @property
    def together(self) -> int:
        return self.slots

    @property
    def biased(self) -> bool:
        return bool(make_decoder(self.section(self.temperature)).biased)

    def section(self, temperature: float) -> dict[str, Any]:
        """The decoder's section."""
        if self.decoder is not None:
            return {**self.decoder, "temperature": temperature}
        return {"name": "ordered", "order": self.order, "per_step": self.per_step, "temperature": temperature}

    def open(self, policy: Policy, profile: str) -> "EngineSampler":
        return EngineSampler(self, policy, profile)


class EngineSampler:
    """See the module. An answer that does not come from the weights of now is an error."""

    def __init__(self, settings: EngineRollouts, policy: Policy, profile: str) -> None:
        self.settings, self.policy, self.profile = settings, policy, profile
        self.version = 0
        self.engine = LocalEngine(
            policy.model,
            policy.tokenizer,
            None,
            # The weights of an answer are soon others: what it leaves would serve nobody, and rest beside the update.
            LocalEngineConfig(
                slots=settings.slots, queue=2**31, quantum=2**31, cache_mib=settings.cache_mib, keep_prefixes=False
            ),
        )

    def sample(
        self,
        prompts: Sequence[Ids],
        seeds: Sequence[int],
        temperature: float | None = None,
        wishes: Sequence[Wish] | None = None,
    ) -> list[Answer | None]:
        wished = [Wish()] * len(prompts) if wishes is None else wishes
        requests = [self._request(*asked, temperature) for asked in zip(prompts, seeds, wished, strict=True)]
        with under_profile(self.profile), self.policy.sampling():
            outputs = ask_all(self.engine.submit_all, requests)
        return [
            None if output is None else self._answer(prompt, output, wish)
            for prompt, output, wish in zip(prompts, outputs, wished, strict=True)
        ]

    def _request(self, prompt: Ids, seed: int, wish: Wish, temperature: float | None) -> Request:
        settings = self.settings
        heat = settings.temperature if temperature is None else temperature
        return Request(
            tokens=prompt,
            decoder={**settings.section(heat), **wish.decoder},
            max_new_tokens=settings.max_new_tokens,
            seed=seed,
            deadline_seconds=settings.seconds,
            trajectory=True,
            given=wish.given,
        )

    def _answer(self, prompt: Ids, output: RequestOutput, wish: Wish) -> Answer:
        if output.weights != self.version:
            raise CheckpointError(
                f"an answer of weights {output.weights} where the policy's are {self.version}",
                "this is a fault of the loop; report it",
            )
        return Answer(
            prompt=prompt,
            tokens=tuple(output.tokens),
            text=output.text,
            ended=output.finish_reason == "eos",
            forwards=output.stats.forwards,
            weights=output.weights,
            trajectory=output.trajectory,
            given=tuple(place for place, _ in wish.given),
        )

    def changed(self) -> None:
        self.version = self.engine.weights_changed()

    def close(self) -> None:
        self.engine.close()
