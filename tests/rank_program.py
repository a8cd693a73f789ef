"""What test_processes.py runs in one process and in two: `python rank_program.py FOLDER` writes each one's tensors."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

import hf_ae
from hf_ae.data import ImagesInMemory, image_column, open_dataset, to_pixel_values

DATA = Path(__file__).parent / "data"
UNET = "block_out_channels=[32,32],norm_num_groups=8,attention_head_dim=4,addition_embed_type_num_heads=4"
TEXT = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"


def main(folder: Path) -> None:
    accelerator = Accelerator()
    rank, processes = accelerator.process_index, accelerator.num_processes
    found = {"autoencoder": of_an_autoencoder(accelerator), "vaegan": of_a_vaegan(accelerator)}
    found |= {kind: of_codebooks(accelerator, kind) for kind in ("ema", "gradient")}
    for name, tensors in found.items():
        torch.save(tensors, folder / f"{name}-{processes}-{rank}.pt")
    accelerator.wait_for_everyone()
    if processes > 1:
        train_a_pipeline(folder)
    else:
        accelerator.end_training()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def of_an_autoencoder(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Gradients for a global batch of 32, as a training reads it."""
    torch.manual_seed(0)
    model = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(hidden_sizes=[32], latent_dim=8))
    processor = hf_ae.AutoencoderImageProcessor.from_config(model.config)
    rows = open_dataset(str(DATA / "fashion_mnist_sample"))["train"]
    images = ImagesInMemory.load(rows, image_column(rows), processor, limit=64)
    place = dict(rank=accelerator.process_index, processes=accelerator.num_processes)
    batch = next(images.batches(32 // accelerator.num_processes, 0, **place))
    wrapped = accelerator.prepare(model)
    accelerator.backward(wrapped(to_pixel_values(batch, accelerator.device, (0.0, 1.0))).loss)
    return gradients(model)


def of_a_vaegan(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Gradients of a model in `eval()`, which draws nothing."""
    torch.manual_seed(0)
    fields = dict(hidden_sizes=[32], latent_dim=8, discriminator_channels=[8, 16], feature_weight=0.01)
    model = hf_ae.VAEGANModel(hf_ae.VAEGANConfig(**fields)).eval()
    x = torch.rand(16, 1, 28, 28)[accelerator.process_index :: accelerator.num_processes]
    wrapped = accelerator.prepare(model)
    accelerator.backward(wrapped(x).loss)
    return gradients(model)


def of_codebooks(accelerator: Accelerator, kind: str) -> dict[str, torch.Tensor]:
    """Codebooks and gradients after six passes in `train()`, in which codewords are placed, moved and revived."""
    torch.manual_seed(0)
    fields = dict(image_size=8, hidden_sizes=[8], latent_dim=12, num_codes=4, codebook_size=24, revive_after=2)
    model = hf_ae.VQVAEModel(hf_ae.VQVAEConfig(**fields, quantizer=kind))
    wrapped = accelerator.prepare(model)
    for step in range(6):
        x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        accelerator.backward(wrapped(x[accelerator.process_index :: accelerator.num_processes]).loss)
    return {**model.quantizers.state_dict(), **{f"gradient.{n}": g for n, g in gradients(model).items()}}


def train_a_pipeline(folder: Path) -> None:
    """Two steps of a text-to-image training, as its script takes them."""
    from hf_ae.train_latent_diffusion import LatentDiffusionArguments, train

    fields = dict(network="resnet", image_size=32, num_channels=3, patch_size=4, hidden_sizes=[16, 16])
    torch.manual_seed(0)
    vae = hf_ae.VAEModel(hf_ae.VAEConfig(**fields, latent_channels=4, pixel_range=[-1.0, 1.0]))
    if Accelerator().is_main_process:
        vae.save_pretrained(folder / "vae")
    Accelerator().wait_for_everyone()
    args = LatentDiffusionArguments(
        dataset_name=str(DATA / "noto_emoji_sample"), vae=str(folder / "vae"), output_dir=str(folder / "pipeline"),
        unet_overrides=UNET, text_encoder=TEXT, max_train_steps=2, validation_epochs=0, max_text_length=12,
        num_inference_steps=2, train_batch_size=4,
    )  # fmt: skip
    train(args)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
