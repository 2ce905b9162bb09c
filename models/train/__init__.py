"""Training: `python -m models.train`. Nothing outside this package imports it."""
