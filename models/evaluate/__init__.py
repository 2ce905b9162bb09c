"""Evaluation: `python -m models.evaluate`, from real bytes to figures."""
