"""The only package that knows transformers, datasets and lm-eval."""
