"""Nouns, arrays, atomic files, JSON into types, options and outputs: what everything else is written in."""
