"""What this machine has, what is missing, and whether a configuration can run here."""
