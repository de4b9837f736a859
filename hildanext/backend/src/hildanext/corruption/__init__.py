"""From clean tokens to the noised batches that a model learns from: noise, its views, what a forward is fed."""
