"""H4, the four benchmarks of the sDPO paper, evaluated by lm-eval."""
