"""-log p of a text or of an answer: exact where that is possible, a bound or an estimate elsewhere.

`LIKELIHOODS` are the estimators of a whole text's; to add one: write the file, add its row, add its case.
`held_out.py` adds them up over a data set, `conditional.py` scores answers to a prompt.
"""

from hildanext.likelihood.base import Likelihood, Noising
from hildanext.likelihood.count import CountLikelihood
from hildanext.likelihood.coupled import CoupledLikelihood
from hildanext.likelihood.exact import ExactLikelihood
from hildanext.likelihood.time import TimeLikelihood

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "count": CountLikelihood,
    "time": TimeLikelihood,
    "coupled": CoupledLikelihood,
    "exact": ExactLikelihood,
}

__all__ = ["LIKELIHOODS", "Likelihood", "Noising"]
