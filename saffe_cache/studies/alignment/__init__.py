"""How well two frozen encoders agree on the same items, and which fusion that recommends."""
