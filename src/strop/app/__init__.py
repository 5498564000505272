"""strop.app."""
