"""strop.data."""
