"""In the making."""

tune_stages = None
