"""Published ways to align two frozen encoders in closed form: no steps, and validation chooses the few parameters."""
