"""One run: its directory, and its stages in their order."""
