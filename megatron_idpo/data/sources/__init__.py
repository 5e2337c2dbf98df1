"""From files, directories and the hub to preference records."""
