"""What a model is taught with: sources, chat, packing, causal graphs, prompts."""
