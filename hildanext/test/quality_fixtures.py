"""Benchmark files of a few rows, and the embedded pair in fp64, where no two answers are nearly tied."""

import json
from functools import cache
from pathlib import Path

import torch

from hildanext.core.runtime import RuntimeConfig
from hildanext.eval.models import ModelPair
from hildanext.eval.task_session import open_pair

QUESTIONS = [
    ("Tom has 3 apples and buys 4 more. How many does he have?", "He has 3+4=<<3+4=7>>7 apples.\n#### 7"),
    ("A box holds 12 eggs. How many are in 2 boxes?", "There are 2*12=<<2*12=24>>24 eggs.\n#### 24"),
    ("Ann had $1,200 and spent $200. What is left?", "She has 1200-200=<<1200-200=1000>>1,000 left.\n#### 1,000"),
    ("Sam is 5 degrees below zero. What is it?", "It is <<0-5=-5>>-5.\n#### -5"),
    ("One more?", "Yes, 1.\n#### 1"),
]
STORIES = [
    "Once upon a time there was a little girl named Lily. She had a red ball.",
    "Tom and his mom went to the park. Tom saw a big dog.",
    "The sun was hot.",
]
CHOICES = [
    {
        "question": "What colour is the sky?",
        "choices": ["red", "blue", "green", "black"],
        "answer": 1,
        "subject": "sky",
    },
    {"question": "Who barks?", "choices": ["a dog", "the big old cat"], "answer": "A", "subject": "sky"},
    {"question": "What do you eat?", "choices": ["a cake", "a car", "the sun"], "answer": "a cake", "subject": "sky"},
]


def lines(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def gsm8k_folder(folder: Path) -> str:
    rows = [{"question": question, "answer": answer} for question, answer in QUESTIONS]
    lines(folder / "test.jsonl", rows)
    examples = [{"question": f"What is {n}+1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(7)]
    lines(folder / "train.jsonl", examples)
    return str(folder)


def stories_file(path: Path) -> str:
    path.write_text("\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n", encoding="utf-8")
    return str(path)


@cache
def tiny_pair() -> ModelPair:
    return open_pair("tiny", None, RuntimeConfig("cpu", "fp64", torch.get_num_threads()))[0]
