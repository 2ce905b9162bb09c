"""The codec and the diffusion decoder. This package does not depend on HTTP or Redis."""
