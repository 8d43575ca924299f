"""pruned -> adapter."""
