"""The one list of variants that drives the shared tests: name -> (model_type, configuration fields)."""

import torch

import hf_ae

CONV = dict(network="conv", image_size=[12, 16], hidden_sizes=[4, 8])
RESNET = dict(network="resnet", image_size=16, hidden_sizes=[8, 16])

VARIANTS = {
    "autoencoder-mlp": ("hf_ae_autoencoder", dict(hidden_sizes=[24, 12], latent_dim=5, activation="sigmoid")),
    "autoencoder-conv": ("hf_ae_autoencoder", dict(CONV, latent_dim=5, num_channels=3)),
    "autoencoder-unpool": ("hf_ae_autoencoder", dict(CONV, latent_dim=5, downsample="maxpool", upsample="unpool")),
    "autoencoder-nearest": (
        "hf_ae_autoencoder",
        dict(CONV, latent_channels=2, downsample="maxpool", upsample="nearest"),
    ),
    "autoencoder-resnet": ("hf_ae_autoencoder", dict(RESNET, latent_channels=3)),
    "autoencoder-patches": ("hf_ae_autoencoder", dict(RESNET, patch_size=4, latent_dim=3)),
    "sparse-l1": ("hf_ae_sparse", dict(hidden_sizes=[16], latent_dim=40, latent_activation="relu")),
    "sparse-topk": ("hf_ae_sparse", dict(hidden_sizes=[16], latent_dim=40, sparsity="topk", k=5)),
    "sparse-kl": ("hf_ae_sparse", dict(CONV, latent_channels=3, sparsity="kl", latent_activation="sigmoid")),
    "denoising": (
        "hf_ae_denoising",
        dict(CONV, latent_channels=3, num_channels=3, corruption="masking", sparsity="l1"),
    ),
    "denoising-transform": (
        "hf_ae_denoising",
        dict(
            network="transform", image_size=16, num_channels=3, hidden_sizes=[8, 16], patch_size=2, latent_channels=48,
            corruption="grayscale", pixel_range=[-1.0, 1.0],
        ),
    ),
    "contractive-exact": ("hf_ae_contractive", dict(hidden_sizes=[], latent_dim=9, latent_activation="sigmoid")),
    "contractive-deep": ("hf_ae_contractive", dict(hidden_sizes=[16], latent_dim=6, reconstruction_loss="bce")),
    "vae-mlp": ("hf_ae_vae", dict(hidden_sizes=[24], latent_dim=5, reconstruction_loss="bce")),
    "vae-resnet": (
        "hf_ae_vae",
        dict(
            network="resnet", image_size=[16, 24], num_channels=3, hidden_sizes=[8, 8, 16], latent_channels=4,
            pixel_range=[-1.0, 1.0], reconstruction_loss="l1", kl_weight=1e-6,
        ),
    ),
    "beta-vae": ("hf_ae_beta_vae", dict(hidden_sizes=[16], latent_dim=5)),
    "beta-vae-capacity": (
        "hf_ae_beta_vae",
        dict(hidden_sizes=[16], latent_dim=5, objective="capacity", capacity=3.0, capacity_steps=8),
    ),
    "beta-vae-tc": (
        "hf_ae_beta_vae",
        dict(hidden_sizes=[16], latent_dim=5, objective="total_correlation", dataset_size=100),
    ),
    "beta-vae-factor": ("hf_ae_beta_vae", dict(hidden_sizes=[16], latent_dim=5, objective="factor")),
    "vaegan-mlp": (
        "hf_ae_vaegan",
        dict(hidden_sizes=[16], latent_dim=5, discriminator_channels=[4, 8], feature_weight=0.01),
    ),
    "vaegan-conv": (
        "hf_ae_vaegan",
        dict(
            CONV, latent_channels=2, num_channels=3, discriminator_channels=[4, 8], pixel_range=[-1.0, 1.0],
            adversarial_loss="non_saturating", adversarial_start=2,
        ),
    ),
    "compressive": (
        "hf_ae_compressive",
        dict(
            image_size=16, num_channels=1, hidden_sizes=[8, 8], patch_size=2, num_res_blocks=1, latent_channels=12,
            hyper_channels=[8, 4],
        ),
    ),
    "vqvae-ema": ("hf_ae_vqvae", dict(CONV, latent_channels=3, codebook_size=16)),
    "vqvae-gradient": (
        "hf_ae_vqvae",
        dict(hidden_sizes=[24], latent_dim=12, num_codes=4, quantizer="gradient", codebook_size=8),
    ),
    "vqvae-cosine": ("hf_ae_vqvae", dict(RESNET, codebook_size=16, code_distance="cosine")),
    "vqvae-fsq": ("hf_ae_vqvae", dict(CONV, quantizer="fsq", fsq_levels=[5, 4, 3])),
    "vqvae2": (
        "hf_ae_vqvae2",
        dict(image_size=[12, 20], hidden_sizes=[8, 8], latent_channels=8, codebook_size=16),
    ),
    "vqvae2-three-levels": (
        "hf_ae_vqvae2",
        dict(CONV, num_levels=3, latent_channels=9, codebook_size=8, quantizer="gradient"),
    ),
}  # fmt: skip


def make(name: str, **more):
    """A new model of a variant, the same at every call; `more` are fields that it does not set."""
    torch.manual_seed(0)
    model_type, fields = VARIANTS[name]
    cls = hf_ae.MODELS[model_type]
    return cls(cls.config_class(**fields, **more))


def shaken(name: str = "compressive", amount: float = 0.05):
    """A variant in eval mode with random weights everywhere, so that no part of it is still at zero."""
    model = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * amount)
    model.tables_are_stale = True
    model.update_tables()
    return model.eval()


def smooth_image(width: int = 61, height: int = 40, mode: str = "L", seed: int = 0):
    """A smooth PIL image with some noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    array = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    array = (array + rng.integers(-6, 7, array.shape)).clip(0, 255)
    return Image.fromarray(array.astype(np.uint8)).convert(mode)


def pixels(model, batch: int = 4, seed: int = 1):
    """Random pixel_values for a model."""
    low, high = model.config.pixel_range
    shape = (batch, model.config.num_channels, *model.config.image_hw)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def rgb_model():
    """A small compressive model of colour images."""
    torch.manual_seed(0)
    fields = dict(
        image_size=32, hidden_sizes=[8, 8], patch_size=4, num_res_blocks=1, latent_channels=24, hyper_channels=[8, 4]
    )
    return hf_ae.CompressiveAutoencoderModel(hf_ae.CompressiveAutoencoderConfig(**fields)).eval()
