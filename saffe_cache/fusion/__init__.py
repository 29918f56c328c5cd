"""Fusions of cached hidden states. Pure torch, no I/O."""
