"""The command line: one program, one module per verb with more than a few lines."""
