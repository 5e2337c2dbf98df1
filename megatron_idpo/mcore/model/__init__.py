"""GPTModel chunks: architecture, specs, construction."""
