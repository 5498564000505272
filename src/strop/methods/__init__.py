"""strop.methods."""
