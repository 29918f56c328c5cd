"""What saffe-ablate does: a recipe into runs, the runs side by side, their reports into one table."""
