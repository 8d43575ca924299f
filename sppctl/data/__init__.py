"""Texts and instruction rows, and the tokens made from them."""
