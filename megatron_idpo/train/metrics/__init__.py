"""Metrics of a run: reduction over ranks, names, file, throughput, intervals."""
