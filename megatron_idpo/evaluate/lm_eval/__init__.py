"""The H4 benchmarks through lm-eval."""
