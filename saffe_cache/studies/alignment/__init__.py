"""How far two frozen encoders agree on the same items, and which fusion that speaks for. No I/O."""
