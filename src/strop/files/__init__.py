"""strop.files."""
