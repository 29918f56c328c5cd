"""Which method aligns two frozen encoders best with few pairs."""
