"""What saffe extract does: what a cache lacks of an encoder, and the loop that encodes it."""
