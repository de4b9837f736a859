"""Estimates of an answer's log-probability. To add one: write the file, add its row, add its case."""

from hildanext.rl.likelihoods.base import PolicyLikelihood
from hildanext.rl.likelihoods.block_elbo import BlockElbo
from hildanext.rl.likelihoods.left_to_right import LeftToRight
from hildanext.rl.likelihoods.mean_field import MeanField
from hildanext.rl.likelihoods.predictions import Predictions
from hildanext.rl.likelihoods.trajectory import TrajectoryLikelihood

POLICY_LIKELIHOODS: dict[str, type[PolicyLikelihood]] = {
    "block_elbo": BlockElbo,
    "left_to_right": LeftToRight,
    "mean_field": MeanField,
    "predictions": Predictions,
    "trajectory": TrajectoryLikelihood,
}

__all__ = ["POLICY_LIKELIHOODS", "PolicyLikelihood"]
