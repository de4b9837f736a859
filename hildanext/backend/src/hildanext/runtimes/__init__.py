"""Networks that something else than torch computes."""
