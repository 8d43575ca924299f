"""Sparsity-preserving adapters, each a stock PEFT method."""
