"""`hf_ae.latents.sampling` under its short name."""

from .latents.sampling import FILE, KINDS, Sampler, encode_all, fit, fit_sampler, prior, sample

__all__ = ["FILE", "KINDS", "Sampler", "encode_all", "fit", "fit_sampler", "prior", "sample"]
