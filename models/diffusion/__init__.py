"""Diffusion decoder: from the codec's latents to a realistic picture."""
