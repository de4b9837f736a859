"""The policy: a diffusion model that learns, how it is asked, and the one that its KL holds on to."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from hildanext.core.errors import ConfigError
from hildanext.data.chat_template import Message, encode_chat
from hildanext.data.problems import Problem
from hildanext.inference import checked_prompt, context_length
from hildanext.models.bidirectional import DiffusionModel
from hildanext.models.lora import without_lora
from hildanext.tokenization import encode_prompt


class Policy:
    """A model and its tokenizer. `chat` puts problems into the model's chat template.

    Dropout is off for good: rollouts, likelihoods and updates must be of one and the same law.
    """

    def __init__(self, model: DiffusionModel, tokenizer: Any, chat: bool, adapters: bool) -> None:
        if chat and tokenizer.chat_template is None:
            raise ConfigError(
                "the model has no chat template", "set rl.prompting to text, or fine-tune it with sft first"
            )
        self.model, self.tokenizer, self.chat, self.adapters = model, tokenizer, chat, adapters
        self._frozen: DiffusionModel | None = None
        no_dropout(model)

    @property
    def end(self) -> int:
        """The end of text."""
        return int(self.tokenizer.eos_token_id)

    def encode(self, problem: Problem) -> tuple[int, ...]:
        """The prompt's ids. Raises `PromptError`."""
        if self.chat:
            ids = encode_chat(self.tokenizer, [Message("user", problem.prompt)])
        else:
            ids = encode_prompt(self.tokenizer, problem.prompt)
        return tuple(checked_prompt(self.model, self.tokenizer, ids))

    def room(self, prompt: int) -> int:
        """New tokens that the context leaves behind a prompt."""
        return context_length(self.model) - prompt

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Within the context the model writes: nothing is recomputed, no layer is in its mode of training."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def keep_reference(self) -> None:
        """Remember the policy as it is now, before its first step. With adapters it is the model without them; else a
        frozen copy, which takes the memory of the weights once more."""
        if not self.adapters and self._frozen is None:
            self._frozen = copy.deepcopy(self.model).requires_grad_(False)

    @contextlib.contextmanager
    def reference(self) -> Iterator[DiffusionModel]:
        """The policy that the KL holds on to."""
        if self._frozen is not None:
            yield self._frozen
            return
        with without_lora(self.model):
            yield self.model


def no_dropout(model: nn.Module) -> None:
    """Turn every dropout of a model off."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):
            setattr(part, "attention_dropout", 0.0)  # noqa: B010  (a module's attributes are typed as modules)
