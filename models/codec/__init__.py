"""Bitstreams, latents, and the codec networks that turn latents into instant pictures."""
