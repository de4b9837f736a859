"""The program in which math-verify runs: a line of JSON asks whether an answer equals the right one, a line answers.

It is started as a file by `computer_algebra.py` and imports nothing of this package.
"""

import json
import sys

MEMORY_BYTES = 4 << 30
"""Of addresses: `9^{9^{9^9}}` is a short answer."""


def main() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX alone: the reader of plain expressions evaluates text as Python. Without math-verify's own clocks: they are
    # signals, which long sums inside the interpreter do not hear; whoever started this program kills it instead.
    how = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None}
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        answer, gold = (parse(f"\\boxed{{{question[side]}}}", **how) for side in ("answer", "gold"))
        print(json.dumps({"equal": bool(verify(gold, answer, timeout_seconds=None))}), flush=True)


if __name__ == "__main__":
    main()
