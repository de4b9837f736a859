"""The web service's rooms: one router for each noun, and what they share.

`hildanext.api.create_app` puts them together; `hildanext.verbs.serve` runs them. Routers know an engine and a room of
jobs by their interfaces alone.
"""
