"""base -> pruned."""
