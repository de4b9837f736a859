"""Alignments compared: methods under one budget, their gradients against the exact one, and what a step costs.

In reading order: `config`, `runs` and `readings`, then `comparison` with `comparison_report`; `enumerable` and
`gradient` with `drawn_gradients` and `gradient_report`; `speed` with `speed_report`.
"""
