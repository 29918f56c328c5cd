"""Training: options, batches, the objective, the loop, checkpoints, and the folder of a run."""
