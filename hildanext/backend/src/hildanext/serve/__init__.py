"""The service: routers by noun, what every request passes on its way in, and the program around them.

`hildanext.api.create_app` puts them together. Nothing here decodes: an engine answers, a room holds the jobs.
"""
