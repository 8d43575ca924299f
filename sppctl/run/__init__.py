"""One run: its directory and its stages."""
