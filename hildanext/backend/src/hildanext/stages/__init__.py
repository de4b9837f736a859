"""The stages of a recipe, a file each: `check` builds all but the weights, `stage` does the work.

A stage writes into `context.stage_dir`, can be called again after a kill, and returns a small JSON outcome that later
stages read. To add one: write the file, add its row, add its test. Importing a stage loads no torch.
"""

STAGES = {
    "prepare": "hildanext.stages.prepare",
    "convert": "hildanext.stages.convert",
    "sft": "hildanext.stages.sft",
    "rl": "hildanext.stages.rl",
    "eval": "hildanext.stages.eval",
    "bench": "hildanext.stages.bench",
    "generate": "hildanext.stages.generate",
    "report": "hildanext.stages.report",
}
"""The stages of a recipe, each a module with `check(section, context)` and `stage(section, context)`."""
