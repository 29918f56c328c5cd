"""Retrieval: the index, the metrics, and the protocols that say what is searched with what."""
