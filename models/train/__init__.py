"""Training: `python -m models.train`. No module outside this package imports it."""
