"""The configuration: typed, immutable sections, YAML with line numbers, overrides."""
