"""Retrieval protocols: queries, relevance and scores, shared by validation and evaluation."""
