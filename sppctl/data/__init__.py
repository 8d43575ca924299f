"""Texts and instruction rows, and the tokens that models are given."""
