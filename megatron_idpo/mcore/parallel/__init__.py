"""Process groups, pipeline stages, and the processes of a run."""
