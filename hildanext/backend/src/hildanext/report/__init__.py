"""What a run did, for people: the page at its end, a denoising, runs beside each other.

Read `html`, `trace_html`, `compare_runs`.
"""
