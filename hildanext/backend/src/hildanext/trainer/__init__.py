"""Parts of the training loop: guards, resumable state, live progress."""
