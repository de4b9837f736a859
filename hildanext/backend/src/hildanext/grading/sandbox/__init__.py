"""Runs programs that nobody vouches for, and says whether they did what a test asks. Standard library only.

Three processes for each program, started afresh and gone afterwards:

    run.py        the trainer's side: one call per program, a verdict back
    checker.py    trusted: runs the test against a stub, which sends each call to the worker; measures the time
    launcher.py   trusted: locks a child down (levels.py says how far), watches it, kills it and all it left behind
    worker.py     that child: runs the program; only values come out of it, in the plain types of codec.py

What this protects against, and what not, is in docs/sandbox.md.
"""
