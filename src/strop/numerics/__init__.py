"""strop.numerics."""
