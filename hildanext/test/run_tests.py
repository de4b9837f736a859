"""Run the whole suite, from anywhere; further arguments go to pytest.

python hildanext/test/run_tests.py
python hildanext/test/run_tests.py -k decode -m slow
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("pytest", "xdist", "hypothesis", "beartype", "psutil", "schemathesis", "math_verify")


def main(arguments: list[str]) -> int:
    """Pytest's exit code. Installs the test tools first where they are missing, and says so."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        target = f"{ROOT / 'hildanext' / 'backend'}[test]"
        print(f"missing {', '.join(missing)}: installing the test tools into {sys.prefix}", flush=True)
        done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", target], check=False)
        if done.returncode:
            print('error: could not install them: pip install -e "hildanext/backend[test]"', file=sys.stderr)
            return 2
    # One thread per worker: the models are tiny, and workers that share cores slow each other down.
    environment = {"OMP_NUM_THREADS": "1", "HILDA_TEST_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MPLBACKEND": "Agg"} | dict(os.environ)
    workers = [] if any(word.startswith(("-n", "--pdb")) for word in arguments) else ["-n", _workers()]
    command = [sys.executable, "-m", "pytest", *workers, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def _workers() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(min(cores, 4))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
