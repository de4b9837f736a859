"""Stage 2, alignment with verifiable rewards. So far it holds the rewards."""
