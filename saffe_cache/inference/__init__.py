"""Use a trained run on new inputs: vectors, an index to search, a page, exchange."""
