"""How much memory a run will take, told from the model's `config.json` alone.

Read `architecture` (a model's numbers), `layer` (what autograd keeps), `step` and `serving` (the peaks), `plan` (does
it fit), `switches` (what would make it fit).
"""
