"""Every mask that is surer than the threshold: LLaDA2.1's rule, and the default."""

from hildanext.core.config import config
from hildanext.decoding.base import Canvas
from hildanext.decoding.reveal.base import Facts, Fill, Memory, Reveal


@config
class Threshold(Reveal):
    """Masks whose candidate has a probability above `tau_mask`, strictly.

    Paper: LLaDA2.1, arXiv:2602.08676; Fast-dLLM, arXiv:2505.22618.
    """

    def reveal(self, facts: Facts, canvas: Canvas, memory: Memory) -> tuple[Fill, Memory]:
        return canvas.masked & (facts.confidence > facts.tau), ()
