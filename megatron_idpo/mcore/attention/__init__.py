"""Core attention for packed shared-prompt rows."""
