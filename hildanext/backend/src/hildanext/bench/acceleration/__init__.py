"""Ways to write faster, set beside each other: tokens per forward and per second, and what the text is worth.

- `ways`: a way to write, and who writes so;
- `prompts`: what is continued;
- `cells`: every way on every prompt, in turns, a file for each part, so that a killed run goes on;
- `readings`: the numbers of a way, with intervals;
- `sweeps`, `frontier`, `frontier_report`: `hildanext bench frontier`;
- `ablations`, `ablations_report`: `hildanext bench ablations`;
- `overhead`: what a rule of filling costs beside the threshold's.
"""
