"""Discrete codes: quantizers against hand-computed references, files of indices, warnings of a collapse."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel
from variants import VARIANTS, make, pixels, smooth_image

import hf_ae
from hf_ae.codec import CorruptFileError, compress, decompress, tiles, unpack
from hf_ae.models.quantizers import k_means, make_quantizer, usage_and_perplexity
from hf_ae.train import train
from hf_ae.training.checkpoints import save_model
from hf_ae.training.collapse import Watch, codebook_collapse

DISCRETE = pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("vq")])


def quantizer(**fields):
    torch.manual_seed(0)
    made = make_quantizer(hf_ae.VQVAEConfig(**{**dict(latent_dim=3, codebook_size=8, kmeans_rounds=0), **fields}))
    made.reset_parameters()
    return made.train()


def code(batch=6, values=3, positions=5, seed=1):
    return torch.randn(batch, values, positions, generator=torch.Generator().manual_seed(seed))


# Vector quantization


def test_moving_averages_are_those_of_van_den_oord_et_al():
    """Appendix A.1, with N and m kept apart."""
    vq, decay = quantizer(ema_decay=0.9), 0.9
    size, total = torch.ones(8, dtype=torch.float64), vq.codebook.double().clone()
    for step in range(20):
        z = code(seed=step)
        chosen = vq(z).indices.flatten()
        flat = z.mT.reshape(-1, 3).double()
        for k in range(8):
            size[k] = decay * size[k] + (1 - decay) * (chosen == k).sum()
            total[k] = decay * total[k] + (1 - decay) * flat[chosen == k].sum(0)
        torch.testing.assert_close(vq.codebook.double(), total / size[:, None], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vq.cluster_sizes.double(), size, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_each_vector_gets_its_nearest_codeword(distance):
    vq = quantizer(code_distance=distance).eval()
    z = code()
    flat, words = z.mT.reshape(-1, 3), vq.codebook
    if distance == "cosine":
        expected = F.cosine_similarity(flat[:, None], words[None], dim=-1).argmax(1)
        words = words / words.norm(dim=1, keepdim=True)
    else:
        expected = torch.cdist(flat, words).argmin(1)
    found = vq(z)
    assert torch.equal(found.indices.flatten(), expected)
    torch.testing.assert_close(found.latents, words[expected].view(6, 5, 3).mT)


def test_commitment_moves_the_encoder_alone_and_the_codebook_term_the_codebook_alone():
    vq, z = quantizer(quantizer="gradient"), code().requires_grad_()
    found = vq(z)
    words = vq.codebook[found.indices].mT
    pull, push = (
        torch.autograd.grad(found.terms["commitment"], x, retain_graph=True, allow_unused=True)[0]
        for x in (z, vq.codebook)
    )
    assert push is None
    torch.testing.assert_close(pull, 2 * (z - words) / 6)
    pull, push = (
        torch.autograd.grad(found.terms["codebook"], x, retain_graph=True, allow_unused=True)[0]
        for x in (z, vq.codebook)
    )
    assert pull is None
    expected = torch.zeros(8, 3).index_add_(0, found.indices.flatten(), (2 * (words - z) / 6).mT.reshape(-1, 3))
    torch.testing.assert_close(push, expected.detach())
    torch.testing.assert_close(found.terms["commitment"], (z - words).square().sum((1, 2)).mean())
    straight = torch.randn(found.latents.shape)
    torch.testing.assert_close(torch.autograd.grad((found.latents * straight).sum(), z)[0], straight)


def test_beta_weighs_the_commitment():
    losses = {}
    for beta in (0.25, 1.0):
        model = hf_ae.VQVAEModel(
            hf_ae.VQVAEConfig(latent_dim=6, num_codes=2, quantizer="gradient", commitment_weight=beta)
        ).eval()
        model.load_state_dict(losses.get("weights", model.state_dict()))
        losses["weights"], losses[beta] = model.state_dict(), model(pixels(model)).losses
    torch.testing.assert_close(losses[1.0]["commitment"], 4 * losses[0.25]["commitment"])
    torch.testing.assert_close(losses[1.0]["codebook"], losses[0.25]["codebook"])
    torch.testing.assert_close(losses[1.0]["codebook"], losses[1.0]["commitment"])


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_dead_codewords_move_to_vectors_of_the_batch(kind):
    vq = quantizer(quantizer=kind, revive_after=3)
    with torch.no_grad():
        vq.codebook[2:] += 100
    for step in range(3):
        vq(code(seed=step))
    assert vq.idle.tolist() == [0, 0] + [3] * 6 and bool((vq.codebook[2:] > 50).all())
    z = code(seed=9)
    points = z.mT.reshape(-1, 3)
    vq.place(z.mT)
    assert (
        all(bool((points == word).all(1).any()) for word in vq.codebook[2:])
        and len({tuple(w) for w in vq.codebook.tolist()}) == 8
    )
    vq.eval()(z)
    assert int(vq.passes) == 3, "evaluation learns nothing"
    never = quantizer(revive_after=0)
    never.codebook[2:] += 100
    for step in range(10):
        never(code(seed=step))
    assert bool((never.codebook[2:] > 50).all())


def test_kmeans_places_the_codewords_on_the_first_batch():
    centres = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5], [-5, -5, 0]])
    which = torch.randint(4, (40, 10), generator=torch.Generator().manual_seed(2))
    z = (centres[which] + 0.01 * torch.randn(40, 10, 3, generator=torch.Generator().manual_seed(3))).mT
    vq = quantizer(codebook_size=4, kmeans_rounds=10, ema_decay=0.99)
    found = vq(z)
    assert found.terms["commitment"] < 40 and int(vq.passes) == 1
    from sklearn.cluster import KMeans

    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(4))
    start = points[torch.randperm(500, generator=torch.Generator().manual_seed(0))][:6]
    reference = KMeans(6, init=start.numpy(), n_init=1, max_iter=200, tol=0).fit(points.numpy())
    torch.testing.assert_close(
        k_means(points, 6, 200), torch.from_numpy(reference.cluster_centers_), rtol=1e-3, atol=1e-3
    )
    assert k_means(points[:2], 5, 3).shape == (5, 3)


def test_usage_and_perplexity_are_their_definitions():
    values = usage_and_perplexity(torch.tensor([[0, 0], [1, 3]]), 8)
    assert values["usage"] == 3 / 8
    assert values["perplexity"].item() == pytest.approx(np.exp(-(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))))
    assert usage_and_perplexity(torch.arange(8), 8)["perplexity"].item() == pytest.approx(8)
    model = make("vqvae2")
    output = model(pixels(model))
    assert set(output.measures) == {"usage_1", "perplexity_1", "usage_2", "perplexity_2"} and not set(
        output.measures
    ) & set(output.losses)


# Finite scalar quantization


def test_fsq_indices_and_codewords_are_a_bijection():
    fsq = quantizer(quantizer="fsq", latent_dim=None, codebook_size=None, fsq_levels=[5, 4, 3, 2])
    indices = torch.arange(120)
    words = fsq.words(indices)
    assert len({tuple(w) for w in words.tolist()}) == 120 and words.min() == -1 and words.max() == 1
    for i in range(4):
        assert len(words[:, i].unique()) == [5, 4, 3, 2][i]
    steps, half = torch.tensor([1, 5, 20, 60]), torch.tensor([2, 2, 1, 1])
    assert torch.equal(((words * half + half).long() * steps).sum(1), indices)


def test_fsq_rounds_as_mentzer_et_al_do():
    """Their appendix A.1 with the inverse of tanh, number by number."""
    fsq, z = (
        quantizer(quantizer="fsq", latent_dim=None, codebook_size=None, fsq_levels=[8, 5, 3]),
        code().requires_grad_(),
    )
    found = fsq(z)
    for value, levels, column in zip(z.detach().unbind(1), [8, 5, 3], found.latents.unbind(1)):
        half = (levels - 1) * 1.001 / 2
        offset = 0.5 if levels % 2 == 0 else 0.0
        bounded = torch.tanh(value + np.arctanh(offset / half)) * half - offset
        torch.testing.assert_close(column, bounded.round() / (levels // 2))
    torch.testing.assert_close(fsq.lookup(found.indices), found.latents, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(found.latents.sum(), z)
    assert bool((gradient > 0).all()) and not found.terms


# Models


@DISCRETE
def test_indices_lead_back_to_the_latents_exactly(name):
    model = make(name)
    model(pixels(model))
    model.eval()
    encoded = model.encode(pixels(model, seed=2))
    assert torch.equal(model.indices_to_latents(encoded.indices), encoded.latents)
    shapes = [list(level.shape[1:]) for level in model.levels_of(encoded.indices)]
    assert shapes == model.config.level_shapes() and shapes == sorted(shapes)
    assert torch.equal(model.train()(pixels(model, seed=2)).indices[0], encoded.indices[0])


@DISCRETE
def test_codebooks_stay_float32_whatever_the_model_is_cast_to(name, tmp_path):
    model = make(name)
    model(pixels(model)).loss.backward()
    state = {k: v.clone() for k, v in model.quantizers.state_dict().items()}
    save_model(model, tmp_path, "bfloat16")
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for cast in (half, model.to(torch.bfloat16), model.half()):
        assert cast.dtype != torch.float32
        assert all(
            torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in cast.quantizers.state_dict().items()
        )
    half.train()(pixels(half)).loss.backward()
    assert all(v.dtype == state[k].dtype for k, v in half.quantizers.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        make(name).train()(pixels(half)).loss.backward()


def test_coarse_codes_condition_the_fine_ones():
    """Changing the coarse codewords changes fine codes; the coarse codes do not see fine codewords."""
    model = make("vqvae2")
    x = pixels(model)
    for _ in range(3):
        model(x)
    model.eval()
    before = model.encode(x).indices
    with torch.no_grad():
        model.quantizers[1].codebook.neg_()
    assert torch.equal(model.encode(x).indices[0], before[0])
    with torch.no_grad():
        model.quantizers[1].codebook.neg_()
        model.quantizers[0].codebook.mul_(-3)
    assert not torch.equal(model.encode(x).indices[1], before[1])


def test_configurations_that_contradict_themselves_say_what_to_write():
    cases = [
        (dict(latent_dim=10, num_codes=3), "num_codes=3"),
        (dict(network="conv", hidden_sizes=[4], latent_channels=4, num_codes=2), "num_codes"),
        (dict(fsq_levels=[4, 4]), "quantizer='fsq'"),
        (dict(quantizer="fsq", latent_dim=7), "leave out latent_dim"),
        (dict(quantizer="fsq", codebook_size=3), "leave it out"),
        (dict(codebook_size=1), "codebook_size=1"),
        (dict(prior_heads=2), "prior_layers"),
        (dict(prior_layers=1, prior_hidden_size=10, prior_heads=3), "prior_heads"),
        (dict(network="conv", hidden_sizes=[4], downsample="maxpool", upsample="unpool"), "unpool"),
    ]
    for fields, words in cases:
        with pytest.raises(ValueError, match=words):
            hf_ae.VQVAEConfig(**fields)
    with pytest.raises(ValueError, match="latent_channels"):
        hf_ae.VQVAE2Config(latent_dim=8)
    with pytest.raises(ValueError, match="num_levels"):
        hf_ae.VQVAE2Config(latent_channels=9, num_levels=2)
    assert hf_ae.VQVAEConfig(quantizer="fsq", network="conv", hidden_sizes=[4]).latent_shape[0] == 4
    assert hf_ae.VQVAE2Config(image_size=28, hidden_sizes=[8], patch_size=4).level_shapes() == [[4, 4], [7, 7]]


# Training


@pytest.mark.parametrize("fields", [dict(), dict(quantizer="gradient", code_distance="cosine")])
def test_resumed_training_gives_bitwise_the_weights_and_codebooks(fields, train_args, tmp_path):
    overrides = {
        "network": "conv",
        "hidden_sizes": [4, 8],
        "latent_channels": 4,
        "codebook_size": 32,
        "revive_after": 2,
        **fields,
    }
    common = dict(
        model_type="hf_ae_vqvae",
        config_overrides=overrides,
        mixed_precision="bf16",
        optimizer="muon",
        lr_scheduler="constant",
    )
    train(train_args(**common, max_train_steps=12, output_dir=str(tmp_path / "whole")))
    train(train_args(**common, max_train_steps=5, checkpointing_steps=5, output_dir=str(tmp_path / "cut")))
    (tmp_path / "cut" / "model.safetensors").unlink()
    train(train_args(**common, max_train_steps=12, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="latest"))
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole) and any(k.endswith("codebook") for k in whole)
    assert int(whole["quantizers.0.frequencies"].sum()) == 200 * 49


def test_collapse_is_said_once_with_the_term_and_the_field():
    model, logged = make("vqvae2"), []
    watch = Watch(model, logged.append)
    watch(50)
    model.quantizers[1].idle[1:] = 300
    watch(250)
    watch(300)
    (line,) = logged
    assert line.startswith("warning: at step 250, usage_2: only 1 of 16 codewords") and "codebook_size" in line
    assert list(codebook_collapse(model)) == ["usage_2"] and codebook_collapse(make("vae-mlp")) == {}


# Files


@DISCRETE
def test_files_of_indices_come_back_exactly(name):
    model = make(name)
    for seed in range(3):
        model(pixels(model, seed=seed))
    model.eval()
    height, width = model.config.image_hw
    size = (width, height) if model.config.latent_dim else (width + 5, height + 3)
    mode = "L" if model.config.num_channels == 1 else "RGB"
    uniform, images = (
        compress(model, smooth_image(*size, mode), model_id=""),
        [smooth_image(*size, mode, seed) for seed in range(2)],
    )
    for seed in range(20):
        model.count_indices(model.encode(pixels(model, seed=seed)).indices)
    for image in images:
        data = compress(model, image, model_id="")
        assert unpack(data).method == "indices"
        padded = tiles.padded(model, torch.from_numpy(np.array(image))[None, None])
        with torch.no_grad():
            rebuilt = model(tiles.to_values(model, padded)).reconstruction
        expected = tiles.to_pixels(model, rebuilt)[0, 0, : size[1], : size[0]]
        difference = np.abs(np.asarray(decompress(data, model)).astype(int).reshape(expected.shape) - expected.numpy())
        assert difference.max() <= 1
    assert len(uniform) < 400
    with pytest.raises(CorruptFileError):
        decompress(uniform, make("vae-mlp"))


def test_frequent_codewords_take_fewer_bytes():
    model = make("vqvae-ema").eval()
    image = smooth_image(160, 120)
    uniform = len(compress(model, image, model_id=""))
    values = torch.from_numpy(np.array(image))[None, None] / 255
    model.count_indices(model.encode(values).indices)
    data = compress(model, image, model_id="")
    fitted = len(unpack(data).body)
    shares = model.quantizers[0].frequencies / model.quantizers[0].frequencies.sum()
    entropy = float(torch.special.entr(shares.double()).sum()) / np.log(2) * (160 * 120 / 16) / 8
    assert entropy - 1 < fitted < entropy * 1.02 + 6 and len(data) < uniform
