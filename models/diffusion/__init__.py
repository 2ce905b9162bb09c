"""From latents to the picture that the diffusion decoder draws."""
