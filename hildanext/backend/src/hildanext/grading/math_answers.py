r"""Is a formula the answer? The rule of the MATH data set, and one that also knows equal numbers.

`official` compares strings after the normalisation of the data set's own evaluation (hendrycks/math,
math_equivalence.py): line breaks, `\!`, `\left`, `\right`, degrees, `\$`, `\%` and spaces go; `\tfrac` and `\dfrac` are
`\frac`; units in `\text{ ...}` at the end go; `x=5` is `5`; `.5` is `0.5`; `\sqrt3`, `\frac12`, `1/2` and `0.5` get
their braces. `canonical` holds where `official` does, and for numbers that are equal exactly (`0.25`, `\frac14`, `1/4`;
`1,000` and `1000`), entry by entry in a tuple. Nothing is computed: `2+2` is not `4`. No computer algebra is needed.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

LONGEST = 2000
"""Characters of an answer that are looked at: a model can write without end."""
MOST_DIGITS = 40

_SENTENCE = re.compile(r"[Ff]inal [Aa]nswer is:?\s*(.{1,300}?)\.?\s*(?:I hope it is correct|\n|$)")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_SLASH = re.compile(r"(-?\d+)/(-?\d+)")


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\fbox{...}`, or `\boxed x`) holds, braces matched; None where there is none."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start + len("\\fbox" if text.startswith("\\fbox", start) else "\\boxed") :][:LONGEST]
    if rest.startswith(" "):
        return rest[1:].partition("$")[0].strip()
    if not rest.startswith("{"):
        return None
    depth = 0
    for index, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:index]
    return None


def stated(text: str) -> str | None:
    """The answer of the last "The final answer is ..." (Minerva, arXiv:2206.14858), dollars removed."""
    sentence = None
    for line in text[-20 * LONGEST :].splitlines():
        sentence = _SENTENCE.search(line[-LONGEST:]) or sentence
    return sentence.group(1).strip().strip("$").strip() if sentence else None


def gold_answer(row: Mapping[str, Any]) -> str | None:
    """The `answer` of a row, or what its `solution` boxes; None where it has neither."""
    if isinstance(row.get("answer"), str):
        return str(row["answer"])
    return boxed(row["solution"]) if isinstance(row.get("solution"), str) else None


def official(answer: str | None, gold: str) -> bool:
    """Equal strings after `normalised`."""
    return answer is not None and normalised(answer) == normalised(gold)


def canonical(answer: str | None, gold: str) -> bool:
    """`official`, or equal as exact numbers, entry by entry."""
    if answer is None or official(answer, gold):
        return answer is not None
    ours, theirs = _entries(normalised(answer)), _entries(normalised(gold))
    return len(ours) == len(theirs) and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))


def normalised(answer: str) -> str:
    """The data set's own normal form."""
    text = answer[:LONGEST].replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    text = text.replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    if text.count("\\text{ ") == 1:
        text = text.partition("\\text{ ")[0]
    text = text.replace("\\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = _with_fractions(_with_roots(text).replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    slash = _SLASH.fullmatch(text)
    return f"\\frac{{{slash.group(1)}}}{{{slash.group(2)}}}" if slash else text


def _with_roots(text: str) -> str:
    r"""`\sqrt3` as `\sqrt{3}`."""
    first, *rest = text.split("\\sqrt")
    return first + "".join("\\sqrt" + (part if part[:1] in ("{", "") else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _with_fractions(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`, `\frac1{72}` as `\frac{1}{72}`."""
    first, *rest = text.split("\\frac")
    written = first
    for part in rest:
        if part.startswith("{") or len(part) < 2:
            written += "\\frac" + part
            continue
        top, below, after = part[0], part[1], part[2:]
        written += f"\\frac{{{top}}}{below}{after}" if below == "{" else f"\\frac{{{top}}}{{{below}}}{after}"
    return written


def _entries(text: str) -> list[str]:
    """The parts of a tuple or list with its brackets as parts of their own; one part for anything else."""
    if _THOUSANDS.fullmatch(text):
        return [text]
    if text[:1] in "([" and text[-1:] in ")]" and len(text) > 1:
        return [text[0], *_entries(text[1:-1]), text[-1]]
    return text.split(",")


def _same(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    number = _number(ours)
    return number is not None and number == _number(theirs)


def _number(text: str) -> Fraction | None:
    text = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    if sum(letter.isdigit() for letter in text) > MOST_DIGITS:
        return None
    if _NUMBER.fullmatch(text):
        return Fraction(text.rstrip(".") if text.endswith(".") else text)
    fraction = _FRACTION.fullmatch(text)
    if fraction is None or int(fraction.group(3)) == 0:
        return None
    value = Fraction(int(fraction.group(2)), int(fraction.group(3)))
    return -value if fraction.group(1) == "-" else value
