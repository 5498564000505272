"""strop.evaluation."""
