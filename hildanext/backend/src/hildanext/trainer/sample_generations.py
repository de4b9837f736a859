"""What a model answers to held-out prompts while it is being trained."""

from itertools import islice
from typing import Any

from pydantic import Field

from hildanext.core.config import config
from hildanext.core.errors import PromptError
from hildanext.data.chat_dataset import ChatDataset
from hildanext.decoding import decoder_section, make_decoder
from hildanext.detokenization import Detokenizer
from hildanext.inference import GenerationConfig, context_length, generate
from hildanext.models.bidirectional import DiffusionModel


@config
class SampleConfig:
    """How many held-out prompts are answered at each validation, and how."""

    count: int = Field(default=3, ge=0)
    max_new_tokens: int = Field(default=128, ge=1)
    mode: str = "S_MODE"


class SampleAnswers:
    """Answers to the first held-out conversations whose prompts leave room; always the same ones."""

    def __init__(self, dataset: ChatDataset, model: DiffusionModel, tokenizer: Any, settings: SampleConfig) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.decoder = make_decoder(decoder_section(settings.mode))
        longest_prompt = context_length(model) - settings.max_new_tokens
        held_out = (dataset.conversation(number) for number in range(dataset.conversations))
        fitting = (conversation for conversation in held_out if len(conversation.prompt) <= longest_prompt)
        self.chosen = list(islice(fitting, settings.count))
        if settings.count and not self.chosen:
            raise PromptError(
                f"no held-out prompt leaves room for {settings.max_new_tokens} tokens in the model's context",
                "lower sft.samples.max_new_tokens, or set sft.samples.count to 0",
            )

    def __call__(self, step: int) -> list[dict[str, Any]]:
        """For each prompt: what was asked, what was answered, what was wanted, and the forwards that it took."""
        if not self.chosen:
            return []
        settings = GenerationConfig(max_new_tokens=self.settings.max_new_tokens, batch_size=len(self.chosen))
        prompts = [conversation.prompt for conversation in self.chosen]
        results = generate(self.model, self.tokenizer, prompts, self.decoder, settings)
        records = [result.flat_record("tokens", "forwards") for result in results]
        return [
            {
                "id": conversation.id,
                "prompt": Detokenizer(self.tokenizer).text(conversation.prompt),
                "answer": record["text"],
                "wanted": Detokenizer(self.tokenizer, conversation.prompt).text(conversation.answer),
                **{key: record[key] for key in ("finish_reason", "tokens", "forwards")},
            }
            for conversation, record in zip(self.chosen, records, strict=True)
        ]
