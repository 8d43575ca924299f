"""Any checkpoint -> perplexity, distance to the dense model, accuracy."""
