"""Command lines: `python -m launch.<name>` from the root of the repository."""
