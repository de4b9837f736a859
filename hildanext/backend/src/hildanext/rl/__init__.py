"""Reinforcement learning on verifiable rewards: answers are sampled, judged, and made likelier or less likely.

In reading order: `batch` (the answers of a round), `looks` (how their log-probability is asked for), `packed` (with the
prompt of a group fed once), `divergence` (from a reference), then the families: `likelihoods` (which looks),
`advantages` (how much better than its group), `objectives` (the loss of both), `rollouts` (who samples); `policy`, and
last `rounds`: the windows of an alignment, made of `chunk`s that are kept, which `step` learns from and `measure` asks.
"""
