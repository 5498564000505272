"""strop.recipes."""
