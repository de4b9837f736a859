"""What a model is taught with: sources, packed shards, conversations, prompts, causal graphs.

Read `sources` (documents), `packing` (documents to shards), then the front door `hildanext.datasets`; for conversations
`chat_template`, `chat_dataset`. Both end in a `batch.Batch`. `problems` are what rewards are earned on.
`causal_graphs` says which tokens follow from which.
"""
