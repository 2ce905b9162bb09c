"""Webhooks: settings, the check of receivers' URLs, and the process that sends them."""
