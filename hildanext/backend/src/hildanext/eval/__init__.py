"""How good a model is, beside its parent: likelihoods, benchmark tasks, text."""
