"""Checkpoints for other people: their model cards, their way to the hub, samples of what they write."""
