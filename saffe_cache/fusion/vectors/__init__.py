"""Fusions of one vector a side, as published, each in a file of its own."""
