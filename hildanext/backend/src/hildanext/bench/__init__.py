"""Speed, measured beside a bare loop or a bare forward in the same process; quality is `eval`'s.

Read `train_speed` and `decode_speed` first, then `engine_speed` (requests through the engine) and `serve_load` (many
clients on a running service, which `own_server` starts and `serve_figure` draws).
"""
