"""Does a text belong to a photo? Concatenation against cross-attention, on a cache's stored vectors and tokens."""
