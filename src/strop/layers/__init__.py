"""strop.layers."""
