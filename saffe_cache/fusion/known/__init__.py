"""Published fusions, each implemented as a correction of the same late fusion (correction.py)."""
