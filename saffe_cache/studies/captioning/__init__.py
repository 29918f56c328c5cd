"""Captions from a frozen language model that photos join at one of its layers: projector, greedy text, measures."""
