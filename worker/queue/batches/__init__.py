"""Batches: their records, leases and scripts in Redis."""
