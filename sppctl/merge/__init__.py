"""pruned + adapter -> merged, with verified zeros."""
