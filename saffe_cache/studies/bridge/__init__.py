"""Any medium searches any other through texts: two runs with one text encoder, without pairs of the two media."""
