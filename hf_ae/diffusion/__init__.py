"""Latent diffusion: a denoiser of latents, what it is trained on, and drawing with a pipeline."""
