"""What everything stands on: errors, configuration, the registry of families, run folders. Loads no torch.

Read `errors`, `config` (strict frozen classes, a run's sections), `registry` (a family's table and `build`), then
`run_dir` and `metrics_log`, the only ways in which files of a run are written and read.
"""
