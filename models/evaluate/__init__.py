"""Evaluation: `python -m models.evaluate` measures decodes of real bitstreams."""
