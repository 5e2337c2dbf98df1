"""Console output and loggers of a run."""
