"""Parts of the training loop, whose front door is `hildanext.training`.

Read `task` (what a stage hands to the loop), `config`, `optimizer`, `guard` (stop before good weights are overwritten),
`state` (resume to the same losses); then what is measured on the way: `validation`, `best_checkpoints`, `teacher`,
`sample_generations`. `processes` and `sharded` are for several processes.
"""
