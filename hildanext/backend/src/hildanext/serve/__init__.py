"""The web service's rooms: one router for each noun, and what they share.

`hildanext.api.create_app` puts them together; `hildanext.commands.serve` runs them. Routers know an engine and the
jobs by their interfaces alone.
"""
