"""Text-to-image pipelines of tiny random models, for tests of the real thing without its size."""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
)

import hf_ae
from hf_ae.hub.cards import write_card
from hf_ae.hub.pipeline_folder import save_pipeline
from hf_ae.pipelines import CaptionPrior, TextToImagePipeline, text_to_image
from hf_ae.pipelines.repo_code import bundle

TOKENS, SIDE, SCALE, CHANNELS = 12, 16, 2, 4
"""Tokens of a text; pixels of a side; pixels to a latent position; latent channels."""
PROMPT = "a red cat"
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "singlestep": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}


def scheduler(name="ddim"):
    kind, options = SCHEDULERS[name][0], dict(SCHEDULERS[name][1])
    options |= {"clip_sample": False} if name in ("ddim", "ddpm") else {}
    options |= {} if name == "singlestep" else {"steps_offset": 1}
    return getattr(diffusers, kind)(beta_schedule="scaled_linear", **options)


def unet(**fields):
    torch.manual_seed(0)
    defaults = dict(
        sample_size=SIDE // SCALE, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    return UNet2DConditionModel(**{**defaults, **fields})


def autoencoder_kl():
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4, sample_size=SIDE,
        scaling_factor=0.5,
    )  # fmt: skip


def vae_of_hf_ae(pixel_range=(-1.0, 1.0)):
    torch.manual_seed(1)
    fields = dict(network="resnet", image_size=SIDE, num_channels=3, hidden_sizes=[8, 8], latent_channels=CHANNELS)
    fields |= dict(pixel_range=list(pixel_range), reconstruction_loss="l1", kl_weight=1e-6, scaling_factor=0.7)
    return hf_ae.VAEModel(hf_ae.VAEConfig(**fields)).eval()


def clip():
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=TOKENS)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(tokens), max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1, **size
    )
    return CLIPTextModel(config), tokenizer


def bert(**fields):
    words = ["a", "red", "blue", "cat", "dog", "on", "the", "mat", "with", "hat", "and", "tie"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=TOKENS)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(2)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=TOKENS, **size, **fields)
    return BertModel(config).eval(), tokenizer


class Brightness(torch.nn.Module):
    """A discriminator that finds bright images real; its logits are a map, as PatchGAN's are."""

    def forward(self, pixels):
        assert pixels.min() >= -1 and pixels.max() <= 1 and pixels.min() < 0
        return torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 4)


class LightDecoder(torch.nn.Module):
    """Decodes to twice the size in one layer, into [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(CHANNELS, 3, 1)

    def decode(self, z):
        sample = torch.nn.functional.interpolate(self.layer(z), scale_factor=SCALE).tanh()
        return type("Decoded", (), {"sample": sample})


def components(text=clip, vae=autoencoder_kl, noise="ddim"):
    encoder, tokenizer = text()
    parts = dict(vae=vae().eval(), text_encoder=encoder.eval(), tokenizer=tokenizer)
    return dict(**parts, unet=unet().eval(), scheduler=scheduler(noise))


def pipeline(text=clip, vae=autoencoder_kl, noise="ddim", **extra):
    pipe = TextToImagePipeline(**components(text, vae, noise), default_num_inference_steps=3, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(kind=StableDiffusionPipeline, **parts):
    pipe = kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count=1, seed=0):
    return torch.randn(count, CHANNELS, SIDE // SCALE, SIDE // SCALE, generator=torch.Generator().manual_seed(seed))


# Folders of pipelines


PIZZA_VAE = dict(network="resnet", image_size=16, num_channels=3, hidden_sizes=[8, 8], pixel_range=[-1.0, 1.0])


def pizza_vae():
    torch.manual_seed(0)
    return hf_ae.VAEModel(hf_ae.VAEConfig(**PIZZA_VAE, latent_channels=CHANNELS)).eval()


def pizza_pipeline(vae) -> TextToImagePipeline:
    """Small random components, a prior among them, around a VAE with two levels and four latent channels."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "a", "slice", "of", "pizza"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text_encoder = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=8, **sizes)).eval()
    denoiser = unet().eval()
    prior = CaptionPrior(["a slice", "pizza"], num_texts=3, num_links=3, width=16)
    links = torch.tensor([[0, 1, 1], [0, 1, 2]], dtype=torch.int32)
    prior.load_state_dict({"vectors": torch.randn(3, 16), "means": torch.randn(2, 16), "links": links})
    special = dict(pad_token="[PAD]", unk_token="[UNK]", model_max_length=8)
    return TextToImagePipeline(
        vae=vae.eval(),
        prior=prior,
        text_encoder=text_encoder,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        unet=denoiser,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        default_num_inference_steps=2,
        default_guidance_scale=3.0,
    )


def save_pizza(folder: Path) -> Path:
    """A finished folder, as the training script leaves it, with a light image decoder too."""
    pipe = pizza_pipeline(pizza_vae())
    pipe.image_decoder = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(**PIZZA_VAE)).eval()
    save_pipeline(pipe, folder, "float16")
    (folder / "recipe.yaml").write_text("dataset_name: me/food\nseed: 3\n")
    write_card(folder)
    return folder


def ship(pipe, folder: Path, remote: bool = True) -> Path:
    """Save as repositories are, the pipeline's code beside the weights; that of the VAE must not be run."""
    pipe.save_pretrained(folder)
    if remote:
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = ["pipeline", "TextToImagePipeline"]
        if index["vae"][0] != "diffusers":
            index["vae"] = ["modeling_hf_ae_vae", "VAEModel"]
            code = "raise RuntimeError('the code of the repository was run')"
            (folder / "vae" / "modeling_hf_ae_vae.py").write_text(code)
        (folder / "model_index.json").write_text(json.dumps(index))
        (folder / "pipeline.py").write_text(bundle(Path(text_to_image.__file__)))
    return folder
