"""Maps: figures beside their definitions, and the page in a real browser, from a file."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from command_line import fails, runs
from conftest import SAMPLE

import hf_ae
from hf_ae.latents.map_page import write_map
from hf_ae.latents.maps import map_latents, map_quality, neighbor_accuracy
from hf_ae.loading import load_model

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    """A model with two latents, in a folder."""
    folder = tmp_path_factory.mktemp("plane")
    torch.manual_seed(0)
    config = hf_ae.AutoencoderConfig(hidden_sizes=[64], latent_dim=2, activation="silu")
    hf_ae.AutoencoderModel(config).save_pretrained(folder)
    hf_ae.AutoencoderImageProcessor(size={"height": 28, "width": 28}, num_channels=1).save_pretrained(folder)
    return folder


def by_definition(values: np.ndarray, points: np.ndarray, k: int) -> float:
    """Venna and Kaski 2001: one minus the weighted ranks of those near on the map that are not near in fact."""
    n = len(values)

    def ranks(x):
        distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
        np.fill_diagonal(distances, -1)
        return distances.argsort(1).argsort(1)

    real, mapped = ranks(values), ranks(points)
    intruders = (mapped <= k) & (mapped > 0) & (real > k)
    return 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * (real - k)[intruders].sum()


def test_quality_is_that_of_the_definitions_and_a_perfect_map_has_one():
    values = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    points = values[:, :2].double().numpy()
    found = map_quality(values, points)
    assert found["trustworthiness"] == pytest.approx(by_definition(values.numpy(), points, 12), abs=1e-9)
    assert found["continuity"] == pytest.approx(by_definition(points, values.numpy(), 12), abs=1e-9)
    flat = torch.cat([values[:, :2], torch.zeros(80, 4)], 1)
    assert set(map_quality(flat, points).values()) == {1.0}


def test_neighbours_vote_without_the_point_itself():
    points = np.array([[0, 0], [0, 1], [1, 0], [9, 9], [9, 8], [8, 9]], float)
    assert neighbor_accuracy(points, np.array([0, 0, 0, 1, 1, 1]), k=2) == 1
    assert neighbor_accuracy(points, np.array([0, 0, 1, 1, 1, 1]), k=2) == pytest.approx(5 / 6)
    assert neighbor_accuracy(points[:1], np.array([0]), (points[3:], np.array([1, 1, 1]))) == 0


def test_the_plane_of_most_variance_leads_back_to_latents():
    latents = torch.randn(50, 4, 2, 1, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1])[:, None]
    found = map_latents(latents)
    assert found.method == "pca" and found.can_decode
    centered = latents.flatten(1).double() - latents.flatten(1).double().mean(0)
    variances = torch.linalg.svdvals(centered).square()[:2]  # an independent way to the same
    assert np.allclose(np.square(found.points).sum(0), variances)
    assert np.allclose((found.origin + found.points @ found.axes - latents.flatten(1).numpy()) @ found.axes.T, 0)


@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_neighbour_methods_keep_groups_apart(method):
    if method == "umap":
        pytest.importorskip("umap")
    labels = torch.arange(3).repeat_interleave(20)
    latents = torch.eye(3)[labels] * 9 + torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    found, again = map_latents(latents, method), map_latents(latents, method)
    assert torch.get_num_threads() == threads  # umap's numba set them for the whole process
    assert not found.can_decode and np.array_equal(found.points, again.points)
    assert neighbor_accuracy(found.points, labels.numpy(), k=5) == 1


def test_wrong_input_has_one_line(plane, tmp_path, capsys):
    with pytest.raises(ValueError, match="too few for a map: give at least 30"):
        map_latents(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="hold 3 numbers, not 2"):
        map_latents(torch.zeros(50, 3), "latents")
    with pytest.raises(ValueError, match="NaN"):
        map_latents(torch.full((50, 3), torch.nan))
    command = ["map", plane, "--dataset_name", SAMPLE]
    fails(capsys, [*command, "-o", tmp_path / "map.html", "--label_column", "kind"], "no column 'kind'")
    fails(capsys, [*command, "-o", tmp_path / "map.pdf"], "must end in .html or .png")
    fails(capsys, [*command, "-o", tmp_path / "map.png", "--method", "som"], "method='som' is not known")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_figure(plane, tmp_path, capsys):
    runs("map", plane, "--dataset_name", SAMPLE, "-o", tmp_path / "map.png")
    said = capsys.readouterr().out
    assert "trustworthiness 0." in said and "neighbor_accuracy 0." in said
    from PIL import Image

    assert len(set(Image.open(tmp_path / "map.png").convert("RGB").getdata())) > 50


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium, or CHROMIUM=path")
def test_the_page_decodes_under_the_pointer_without_a_server(plane, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    runs("map", plane, "--dataset_name", SAMPLE, "-o", tmp_path / "map.html")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, problems = browser.new_page(viewport={"width": 900, "height": 600}), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: problems.append(r.url) if r.url.startswith("http") else None)
        page.goto((tmp_path / "map.html").as_uri())
        page.wait_for_function("session !== null && view.scale !== null")
        page.evaluate("pointer = toMap(0, 0)")
        started, moves = time.monotonic(), 0
        while time.monotonic() - started < 2:
            page.mouse.move(100 + moves * 7 % 400, 100 + moves * 11 % 300)
            moves += 1
        assert page.evaluate("frames.length") >= 2 * 20
        page.mouse.move(250, 200)
        page.wait_for_function("!busy && !again")
        x, y = page.evaluate("pointer")
        drawn = page.evaluate("Array.from(by('decoded').getContext('2d').getImageData(0, 0, 28, 28).data)")
        assert "image" in page.inner_text("#what")
        nearest = page.evaluate("[nearest, points[2 * nearest], points[2 * nearest + 1]]")
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert problems == []
    model, _ = load_model(plane)
    with torch.no_grad():
        expected = model.decode(torch.tensor([[x, y]])).sample[0, 0] * 255
    assert (torch.tensor(drawn).view(28, 28, 4)[..., 0] - expected).abs().max() <= 1
    points = map_points(model)
    assert int(np.square(points - [x, y]).sum(1).argmin()) == nearest[0]
    assert np.allclose(points[nearest[0]], nearest[1:], atol=1e-5)


def map_points(model) -> np.ndarray:
    from hf_ae.data import ImagesInMemory, open_dataset, pick_split
    from hf_ae.latents import encode_images
    from hf_ae.loading import image_processor_for

    rows = pick_split(open_dataset(str(SAMPLE), None), "test")
    pixels = ImagesInMemory.load(rows, "image", image_processor_for(model), limit=4000).pixels
    return encode_images(model, pixels.float() / 255).numpy()


def test_images_of_any_size_and_number_fit_on_one_sheet(plane, tmp_path):
    model, _ = load_model(plane)
    images = torch.rand(5000, 3, 12, 150)
    found = map_latents(torch.randn(5000, 2), "pca")
    assert not write_map(tmp_path / "map.html", model, map_latents(torch.randn(40, 9), "tsne"), images[:40])
    from hf_ae.latents.map_page import thumbnails

    assert thumbnails(images)[2] == (5, 64)
    assert found.can_decode
