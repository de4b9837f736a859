"""Names and sizes that writer and runtime of an exported network share. Loads neither onnx nor onnxruntime."""

WEIGHTS = "weights.bin"
CLEAN, BOTH, HEAD = "clean.onnx", "both.onnx", "head.onnx"
DRAFT_HEAD, SAMPLER = "draft_head.onnx", "sampler.onnx"
DRAFT_ROWS = "draft_rows.safetensors"
