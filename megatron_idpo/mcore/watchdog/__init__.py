"""Heartbeats between the processes of a run: who is lost, and what it was doing."""
