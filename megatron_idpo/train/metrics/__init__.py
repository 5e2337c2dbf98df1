"""Metrics of a training step: reduction, names, file, throughput."""
