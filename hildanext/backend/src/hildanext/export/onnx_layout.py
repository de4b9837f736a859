"""Names and sizes that writer and runtime of an exported network share. Loads neither onnx nor onnxruntime."""

WEIGHTS = "weights.bin"
CLEAN, BOTH, HEAD, DRAFT_HEAD = "clean.onnx", "both.onnx", "head.onnx", "draft_head.onnx"
DRAFT_TOKENS = "draft_tokens.safetensors"
SLOTS = 64
"""Slots of a cache are looked at in pieces of so many."""
