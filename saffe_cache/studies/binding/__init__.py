"""Few-shot binding of made-up names: many episodes, each with its own FAM, baselines and controls."""
