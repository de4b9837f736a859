"""-log p of a text or of an answer: exact where that is possible, a bound or an estimate elsewhere."""
