"""Names and sizes that writer and runtime of an exported network share. Loads neither onnx nor onnxruntime."""

WEIGHTS = "weights.bin"
CLEAN, BOTH, HEAD, SAMPLER = "clean.onnx", "both.onnx", "head.onnx", "sampler.onnx"
SLOTS = 64
"""Slots of a cache are looked at in pieces of so many."""
