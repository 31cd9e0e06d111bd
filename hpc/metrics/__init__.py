"""Scores of predictions against references, in percent; `hpc.metrics.table` says which task has which."""
