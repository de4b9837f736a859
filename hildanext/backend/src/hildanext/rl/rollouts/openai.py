"""Answers of a server elsewhere. It tells no trace, and its weights are its own."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import ConfigError
from hildanext.detokenization import Detokenizer
from hildanext.engine.base import Request, Sink, Ticket
from hildanext.engine.remote.openai import OpenAIConfig
from hildanext.rl.batch import Answer
from hildanext.rl.policy import Policy
from hildanext.rl.rollouts.asking import ask_all
from hildanext.rl.rollouts.base import Ids, Rollouts


@config
class OpenAIRollouts(Rollouts):
    """An OpenAI-compatible server that has the policy's weights: of the start, as nobody tells it of later ones.

    Tokens are those of the policy's own tokenizer for the text that came, so that a text which the server wrote in
    other tokens is scored in these.
    """

    traced: ClassVar[bool] = False

    base_url: str
    """Address, with or without /v1."""
    model: str | None = None
    """Its name there; None is the server's first one."""
    api_key_env: str | None = None
    slots: int = Field(default=8, ge=1)
    """Requests that are open there at the same time."""
    stale: Literal["refuse", "allow"] = "refuse"
    """`allow` more than one round, although the server's weights stay those of the first."""

    @property
    def together(self) -> int:
        return 64

    def check_run(self, rounds: int) -> None:
        if rounds > 1 and self.stale == "refuse":
            raise ConfigError(
                f"rollouts openai in {rounds} rounds: from the second on the answers are not those of the policy",
                'set rl.rounds to 1, or rl.rollouts.stale to "allow" and read docs/rl.md',
            )

    def open(self, policy: Policy, profile: str) -> "OpenAISampler":
        return OpenAISampler(self, policy)


class OpenAISampler:
    """See the module."""

    def __init__(self, settings: OpenAIRollouts, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        server = OpenAIConfig(
            base_url=settings.base_url,
            api_key_env=settings.api_key_env,
            slots=settings.slots,
            queue=2**20,
            ignore_extras=True,  # of a request it is the temperature that counts here, which every server knows
        )
        self.engine = server.connect(settings.model, None, "rl.rollouts names it")

    def sample(
        self, prompts: Sequence[Ids], seeds: Sequence[int], temperature: float | None = None
    ) -> list[Answer | None]:
        heat = self.settings.temperature if temperature is None else temperature
        requests = [
            Request(
                prompt=Detokenizer(self.policy.tokenizer).text(list(prompt)),
                decoder={"name": "threshold_edit", "temperature": heat},
                max_new_tokens=self.settings.max_new_tokens,
                seed=seed % 2**31,
                deadline_seconds=self.settings.seconds,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

        def submit_all(asked: Sequence[tuple[Request, Sink]]) -> Sequence[Ticket]:
            return [self.engine.submit(request, sink) for request, sink in asked]

        answers: list[Answer | None] = []
        for prompt, output in zip(prompts, ask_all(submit_all, requests), strict=True):
            if output is None:
                answers.append(None)
                continue
            ended = output.finish_reason != "length"
            ids = self.policy.tokenizer(output.text, add_special_tokens=False).input_ids
            tokens = (*ids, self.policy.end) if ended else tuple(ids)
            answers.append(Answer(prompt, tokens, output.text, ended, output.stats.forwards, 0))
        return answers

    def changed(self) -> None:
        """The server hears nothing of it; see `OpenAIRollouts.stale`."""

    def close(self) -> None:
        self.engine.close()
