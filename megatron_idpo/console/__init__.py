"""Console output shared by all verbs: progress and number formats."""
