"""Few-shot binding of made-up names: episodes, many FAMs fitted at once, what stands beside them."""
