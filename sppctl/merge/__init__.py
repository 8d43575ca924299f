"""pruned + adapter -> merged, with the proof of the zeros."""
