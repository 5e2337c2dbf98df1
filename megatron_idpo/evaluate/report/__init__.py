"""The report: one self-contained HTML page on a run, or on several runs side by side."""
