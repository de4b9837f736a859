"""Names and sizes that writer and runtime of an exported network share. Loads neither onnx nor onnxruntime."""

WEIGHTS = "weights.bin"
CLEAN, BOTH, HEAD = "clean.onnx", "both.onnx", "head.onnx"
DRAFT_HEAD, SAMPLER = "draft_head.onnx", "sampler.onnx"
DRAFT_ROWS = "draft_rows.safetensors"
SLOTS = 64
"""Slots of a cache are looked at in pieces of so many."""
