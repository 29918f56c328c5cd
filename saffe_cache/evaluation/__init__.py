"""What saffe evaluate does: protocols over a run, and the baselines and controls beside them."""
