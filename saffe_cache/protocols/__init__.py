"""Retrieval protocols: one module and one class each, named by one line in `registry`."""
