"""Batches: requests, the task that goes on with them, and their documents."""
