"""Frozen encoders: loading, the truncated forward pass, and the weights of their blocks."""
