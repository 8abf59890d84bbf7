"""Things that scModelForge finds by the entry points in pyproject.toml; nothing is imported before it is named."""
