"""What the comparison of ways to write asks: three kinds of prompts, or those of files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hildanext.data.chat_template import Message, encode_chat
from hildanext.data.prompts import Prompt, read_prompts
from hildanext.tokenization import encode_prompt

QUESTIONS = (
    "A baker makes 24 rolls in the morning and 18 in the afternoon. She sells 35 of them. How many rolls are left?",
    "Tom reads 12 pages a day. His book has 180 pages. How many days does he need for the whole book?",
    "A ticket costs 7 dollars and a drink costs 3 dollars. What do 4 tickets and 2 drinks cost together?",
    "A train travels 60 miles in one hour. How far does it travel in 3 hours and a half?",
    "Ann has twice as many marbles as Ben. Ben has 15 marbles. How many marbles do they have together?",
    "A farmer has 8 rows of 14 trees. A storm breaks 9 of them. How many trees are still standing?",
)
STORIES = (
    "Once upon a time, there was a little dog named Max. One day, Max",
    "Lily found a shiny red ball in the garden. She",
    "One day, a small bird could not find its nest. The bird",
    "Tim and his mom went to the park. They saw a big",
    "There was a cat who liked to sleep in the sun. Every morning",
    "Sara wanted to bake a cake with her grandma. First, they",
)
CHAT = (
    "What is a good name for a small brown rabbit?",
    "How do I keep bread fresh for longer?",
    "Explain in two sentences why the sky is blue.",
    "Suggest three things to do on a rainy afternoon.",
    "Write a short thank-you note to a neighbour.",
    "Why is it useful to sleep enough?",
)


def kinds_of_prompts(files: str | None, count: int, tokenizer: Any) -> dict[str, list[list[int]]]:
    """`count` prompts of each kind at most, as ids: of each file (names behind commas; a kind is called as its file
    is), or the three kinds above. What is asked goes through the chat template where the tokenizer has one.

    Raises `DataError` for a file that cannot be read.
    """
    kinds: dict[str, Sequence[Prompt]] = {
        "questions": [_asked(line, text) for line, text in enumerate(QUESTIONS)],
        "stories": [Prompt(line, text=text) for line, text in enumerate(STORIES)],
        "chat": [_asked(line, text) for line, text in enumerate(CHAT)],
    }
    if files is not None:
        kinds = {Path(name).stem: read_prompts(name) for name in files.split(",")}
    return {kind: [_ids(prompt, tokenizer) for prompt in prompts[:count]] for kind, prompts in kinds.items()}


def _asked(line: int, text: str) -> Prompt:
    return Prompt(line, messages=(("user", text),))


def _ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    if prompt.text is not None:
        return encode_prompt(tokenizer, prompt.text)
    if getattr(tokenizer, "chat_template", None):
        return encode_chat(tokenizer, [Message(role, content) for role, content in prompt.messages])
    return encode_prompt(tokenizer, prompt.messages[-1][1])
