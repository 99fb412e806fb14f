"""One script, one figure or table, one claim: `python -m experiments.NAME` writes a run folder and draws from it."""
