"""What saffe train does: what is asked for, batches, the objective, the loop, and what it resumes from."""
