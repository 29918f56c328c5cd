"""Evaluation of a run: a protocol with its baselines, controls and index."""
