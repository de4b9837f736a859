"""What changes how answers are asked for, or which of them teach. To add one: write the file, add its row and case.

In reading order: `base`, what each hook may change; `stp`, with `hints`; `lens`, with `interference` and `protected`;
`r3l`, with `verifiers`, `reflections` and `imitation`.
"""

from hildanext.rl.plugins.base import Plugin
from hildanext.rl.plugins.lens import Lens
from hildanext.rl.plugins.r3l import R3l
from hildanext.rl.plugins.stp import Stp

PLUGINS: dict[str, type[Plugin]] = {
    "stp": Stp,
    "lens": Lens,
    "r3l": R3l,
}

__all__ = ["PLUGINS", "Plugin"]
