"""Studies over one cache: alignment, binding, captioning, matching and sweeps."""
