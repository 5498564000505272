"""strop.pages."""
