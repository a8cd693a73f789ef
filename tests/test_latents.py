"""What one does with latents: identities that each of them must keep."""

import math

import pytest
import torch
import variants

from hf_ae import AutoencoderConfig, AutoencoderModel
from hf_ae.latents import arithmetic, decode, interpolate, manifold_grid, random_codes, random_latents, traversal


def draw(n=1, shape=(5,), seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plane():
    torch.manual_seed(0)
    return AutoencoderModel(AutoencoderConfig(image_size=[6, 4], hidden_sizes=[8], latent_dim=2)).eval()


@pytest.mark.parametrize("kind", ["linear", "spherical"])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)])
def test_a_way_has_both_ends_exactly_and_its_middle_is_as_far_from_each(kind, shape):
    a, b = draw(2, shape)
    b = b * a.norm() / b.norm()
    way = interpolate(a, b, 7, kind)
    assert way.shape == (7, *shape) and way.dtype == a.dtype
    assert torch.equal(way[0], a) and torch.equal(way[-1], b)
    assert (way[3] - a).norm() == pytest.approx(float((way[3] - b).norm()), rel=1e-5)
    torch.testing.assert_close(interpolate(b, a, 7, kind), way.flip(0))


def test_a_spherical_way_keeps_the_length_and_turns_evenly():
    a, b = torch.nn.functional.normalize(draw(2), dim=1) * 3
    way = interpolate(a, b, 9, "spherical")
    torch.testing.assert_close(way.norm(dim=1), torch.full((9,), 3.0))
    angles = torch.acos((way[1:] * way[:-1]).sum(1) / 9)
    torch.testing.assert_close(angles, angles.mean().expand(8), rtol=1e-3, atol=1e-5)
    assert interpolate(a, b, 9)[4].norm() < 3, "the straight line cuts through"


def test_a_quarter_turn_is_that_of_trigonometry():
    way = interpolate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), 3, "spherical")
    torch.testing.assert_close(way[1], torch.full((2,), 1.5 * math.sqrt(0.5)))


@pytest.mark.parametrize(
    "b",
    [[2.0, 4.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1e-7]],
    ids=["parallel", "opposite", "zero", "nearly"],
)
def test_where_no_arc_is_defined_the_way_is_straight(b):
    a, b = torch.tensor([1.0, 2.0, 0.0]), torch.tensor(b)
    torch.testing.assert_close(interpolate(a, b, 5, "spherical"), interpolate(a, b, 5))


@pytest.mark.parametrize(
    "options, words", [(dict(steps=1), "at least 2"), (dict(steps=3, kind="round"), "linear, spherical")]
)
def test_a_way_that_cannot_be_is_one_clear_line(options, words):
    with pytest.raises(ValueError, match=words):
        interpolate(torch.zeros(2), torch.ones(2), **options)
    with pytest.raises(ValueError, match="different shapes"):
        interpolate(torch.zeros(2), torch.ones(3), 3)


def test_arithmetic_undoes_itself_and_groups_count_by_their_means():
    a, b, c = draw(4, seed=1), draw(3, seed=2), draw(2, seed=3)
    torch.testing.assert_close(arithmetic(b, a, arithmetic(a, b, c)), c)
    torch.testing.assert_close(arithmetic(a, a, c), c)
    torch.testing.assert_close(arithmetic(a, b, b)[None].mean(1)[0], a.mean(0))
    with pytest.raises(ValueError, match="at least one"):
        arithmetic(a[:0], b, c)


def test_a_traversal_changes_one_value_alone():
    model = variants.make("vae-mlp").eval()
    z = draw(1, tuple(model.config.latent_shape))[0]
    drawn = traversal(model, z, 2, [-1.0, float(z[2]), 1.0])
    torch.testing.assert_close(drawn[1:2], decode(model, z[None]))
    moved = z.clone()
    moved[2] = -1
    torch.testing.assert_close(drawn[:1], decode(model, moved[None]))
    with pytest.raises(ValueError, match="0 to 4"):
        traversal(model, z, 5, [0.0])


def test_a_traversal_counts_through_spatial_latents():
    model = variants.make("autoencoder-nearest").eval()
    z = draw(1, tuple(model.config.latent_shape))[0]
    last = z.numel() - 1
    torch.testing.assert_close(traversal(model, z, last, [float(z.flatten()[last])]), decode(model, z[None]))


def test_the_plane_starts_at_the_upper_left(plane):
    drawn = manifold_grid(plane, side=3, x=(-1, 1), y=(-2, 2))
    assert drawn.shape == (9, 1, 6, 4)
    corners = torch.tensor([[-1.0, 2.0], [1.0, 2.0], [-1.0, -2.0], [1.0, -2.0], [0.0, 0.0]])
    torch.testing.assert_close(drawn[[0, 2, 6, 8, 4]], decode(plane, corners))
    with pytest.raises(ValueError, match="two dimensions"):
        manifold_grid(variants.make("vae-mlp"))


def test_random_latents_have_the_spread_that_is_asked_for(plane):
    latents = random_latents(plane, 20_000, seed=1)
    assert torch.equal(latents, random_latents(plane, 20_000, seed=1)) and not torch.equal(
        latents, random_latents(plane, 20_000, seed=2)
    )
    assert latents.mean().abs() < 0.02 and latents.std() == pytest.approx(1, abs=0.02)
    like = torch.tensor([[0.0, 10.0], [2.0, 30.0], [4.0, 20.0]])
    wide = random_latents(plane, 20_000, like)
    torch.testing.assert_close(wide.mean(0), like.mean(0), rtol=0.05, atol=0.1)
    torch.testing.assert_close(wide.std(0), like.std(0), rtol=0.05, atol=0.05)
    assert torch.equal(random_latents(plane, 3, like[:1]), like[:1].expand(3, -1))
    assert random_codes is random_latents, "its former name"
