"""Pruned weights in memory without their zeros: the layout, and a linear layer that computes with it."""
