"""Webhooks: who may receive them, and the process that sends them."""
