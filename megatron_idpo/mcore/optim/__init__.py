"""DDP, AdamW and their state."""
