"""What a run did, for people: the page, the trace, runs beside each other."""
