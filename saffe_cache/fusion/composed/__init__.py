"""Fusions of a photo and a text into one query for photos, each in a file of its own."""
