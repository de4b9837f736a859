"""Exact decoding: drafts that the parent confirms, so that the text is the parent's own.

In reading order: `verify` (which drafts stay, and what is written in place of the first that does not), `expected`
(what a way to place masks gives), `policy` (which way pays on this device), `ngram` (drafts without training), `state`
(documents that are written, all in one forward).
"""
