"""What a puzzle's prompt says, whoever made the puzzle, and how its answer is written where the reward looks for it."""

import re
from collections.abc import Sequence

from hildanext.grading.answer_place import CLOSING, MARKER, OPENING, Place

_STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


def written(answer: str, place: Place) -> str:
    """An answer where a reward with this place looks for it."""
    return {"whole": answer, "marker": f"{MARKER} {answer}", "tags": f"{OPENING}{answer}{CLOSING}"}[place]


def countdown_prompt(numbers: Sequence[int], target: int, place: Place) -> str:
    listed = ", ".join(map(str, numbers))
    how = written("...", place) if place != "whole" else "the expression alone"
    return f"Make {target} of {listed}, each used once, with + - * / and parentheses. Answer with {how}."


def countdown_identity(numbers: Sequence[int], target: int) -> str:
    """The numbers in order and the target: the same problem however they are listed."""
    return f"countdown {sorted(numbers)} {target}"


def sudoku_prompt(puzzle: str, place: Place) -> str:
    how = written("...", place) if place != "whole" else "the 16 digits alone"
    return f"Solve this 4x4 Sudoku, 0 is blank: {puzzle}. Each row, column and box has 1 to 4 once. Answer with {how}."


def expression_of(steps: str) -> str | None:
    """`44-15=29,79-29=50` as one expression, `(79-(44-15))`; None where the text is none of this shape.

    An operand is the latest result with that value that nothing used yet, else a given number.
    """
    results: list[tuple[str, str]] = []
    for step in steps.replace(" ", "").split(","):
        match = _STEP.fullmatch(step)
        if match is None:
            return None
        left, operator, right, made = match.groups()
        sides = []
        for operand in (left, right):
            found = next((pair for pair in reversed(results) if pair[0] == operand), None)
            if found is not None:
                results.remove(found)
            sides.append(operand if found is None else found[1])
        results.append((made, f"({sides[0]}{operator}{sides[1]})"))
    return results[-1][1].removeprefix("(").removesuffix(")") if len(results) == 1 else None
