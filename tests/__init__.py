"""Tests, one folder per package. Shared helpers: `tests.tiny` (small random models, a small tokenizer)."""
