"""Tokens to the ranks that hold their experts, and results back: a readable one-rank reference and the all-to-all."""
