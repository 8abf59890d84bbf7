"""Published model families: how their weights are named, and what maps to what."""
