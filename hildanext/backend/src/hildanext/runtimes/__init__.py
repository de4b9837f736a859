"""Networks that something else than torch computes. `onnx_open.open_onnx` is the door.

Read `onnx_network` (rows and caches), then `onnx_session` (graphs and memory). What they read is written by the room
`export`.
"""
