"""Models written for other programs than torch."""
