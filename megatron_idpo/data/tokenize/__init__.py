"""From preference records to tokenized pairs on disk."""
