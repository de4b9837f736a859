"""Estimates of an answer's log-probability. To add one: write the file, add its row, add its case."""

from hildanext.rl.likelihoods.base import PolicyLikelihood

POLICY_LIKELIHOODS: dict[str, type[PolicyLikelihood]] = {}

__all__ = ["POLICY_LIKELIHOODS", "PolicyLikelihood"]
