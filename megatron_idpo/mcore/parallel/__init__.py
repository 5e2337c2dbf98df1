"""Layouts, process groups, the world and the schedule."""
