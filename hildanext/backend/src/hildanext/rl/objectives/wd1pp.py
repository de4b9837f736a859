"""wd1++: wd1 over what a model predicted on its way as well, each prediction learnt in the state it was made in."""

from typing import ClassVar

from pydantic import Field

from hildanext.core.config import config
from hildanext.rl.desk import Desk
from hildanext.rl.material import Material
from hildanext.rl.objectives.wd1 import Wd1
from hildanext.rl.predictions import with_predictions


@config
class Wd1pp(Wd1):
    """`-A log p(x | state)`, summed over the predictions of a group's answers: their intermediate ones and themselves.

    `steps` steps of every answer are drawn, without replacement, and replayed by one forward each. What is predicted at
    all masks there, by one draw from the sampler's law (its temperature), makes a whole text with what was written
    already. It is judged, and joins the group: wd1's weights are over all of them. log p is summed over the masked
    positions up to the prediction's end of text, by the model's own law.

    Paper: wd1++, arXiv:2507.08838v2, section 3.3, equation 10.
    Differs: a reconstruction of a method without public code. A step is that of every block at once, each given the
    finished blocks before it, so that a prediction joins blocks that did not see each other's predictions; they are
    drawn anew after the answers are whole, not kept while those are written. Tokens behind a prediction's end are not
    read. The mean over groups is the loop's, as in `wd1`.
    """

    likelihoods: ClassVar[tuple[str, ...]] = ("predictions",)

    steps: int = Field(default=2, ge=1)
    """Intermediate predictions of each answer, as far as it has so many steps."""

    def more(self, material: Material, desk: Desk) -> Material:
        return with_predictions(material, desk, self.steps)
