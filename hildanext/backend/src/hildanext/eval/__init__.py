"""How good a model is, beside its parent: likelihoods, benchmark tasks, text.

Read `evaluation` (likelihood, quality and speed in one table); for benchmarks `tasks` (what is asked and how it is
judged), `models` (who answers), `runner` (asks and judges), `journal` (keeps every sample), `summary`; `task_session`
is all of it.
"""
