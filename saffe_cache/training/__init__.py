"""What saffe-train-fam does: what is asked for, batches, the objective, the loop, and what it resumes from."""
