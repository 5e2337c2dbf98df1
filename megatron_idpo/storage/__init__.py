"""Files and directories of a run: atomic writes, locks, sealed records."""
