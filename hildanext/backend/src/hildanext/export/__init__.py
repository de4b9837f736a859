"""Models written for other programs than torch. `FORMATS` are the formats; to add one: write the file, add its row.

Read `network_weights` (a model's matrices), `onnx_graph`, then `onnx_file`; `channel_quantize`, `block_quantize` and
`smoothing` put matrices in 8 and 4 bits. Importing the room loads no onnx.
"""

FORMATS: dict[str, str] = {
    "onnx": "hildanext.runtimes.onnx_check:export_checked",
}
"""A format to the function that writes it: (name, folder, precision, parent) -> its card."""
