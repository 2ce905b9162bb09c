"""Bitstreams, latents and the codec's own picture."""
