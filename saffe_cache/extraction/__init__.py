"""The extraction of hidden states: planning what a cache lacks, encoding it, and repairing damage."""
