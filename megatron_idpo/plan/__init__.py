"""Memory and time of a run before it is started, from sizes alone; imports no torch."""
