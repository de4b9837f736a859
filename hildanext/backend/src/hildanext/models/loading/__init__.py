"""From a name to weights: names, files, the hub, GGUF."""
