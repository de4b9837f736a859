"""Is an answer right? Graders and the rewards made of them. To add one: write the file, add its row, add its case.

Read `rewards` (a number for an answer, from 0 to its `highest`), then `gsm8k`, `math`, `countdown`, `sudoku` or `code`;
`weighted` sums them, `format` looks at the form alone, and `sandbox` runs programs that a model wrote.

The sandbox's processes pass through here on their way to their own modules, and a program that nobody vouches for may
sit beside the standard library alone: the table is loaded when it is asked for.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("REWARDS", "Reward", "checked_scores"):
        from hildanext.grading import rewards

        return getattr(rewards, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
