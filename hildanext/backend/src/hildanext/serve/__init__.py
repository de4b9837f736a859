"""The web service's parts: one router for each noun, and what they share.

`hildanext.api.create_app` puts them together; `hildanext.commands.serve` runs them. Routers know an engine and the
jobs by their interfaces alone. Read `requests` and `responses` (the types), `decoding_params` (a body to a request),
one of the `routers`, `engine_bridge` (the engine's threads to the event loop), `middleware`, `server`.
"""
