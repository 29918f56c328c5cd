"""What saffe-index-eval does: protocols over a run, and the baselines and controls beside them."""
