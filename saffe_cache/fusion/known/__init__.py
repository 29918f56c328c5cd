"""Fusions from elsewhere, each a correction of the same late fusion (correction.py)."""
