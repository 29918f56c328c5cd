"""Sweeps over training options, from TOML recipes."""
