"""strop.training."""
