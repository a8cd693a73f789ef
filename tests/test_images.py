"""Any image becomes pixel_values, and comes back; any dataset becomes batches."""

import io

import datasets
import numpy as np
import pytest
import torch
from conftest import SAMPLE
from PIL import Image

import hf_ae
from hf_ae.data import (
    ImagesInMemory,
    ImageStream,
    binarized_once,
    image_column,
    open_dataset,
    read_labels,
    to_pixel_values,
)
from hf_ae.data.augmentation import shift_randomly


def processor(channels=3, size=8, pixel_range=(0.0, 1.0)):
    config = hf_ae.VAEConfig(image_size=size, num_channels=channels, pixel_range=list(pixel_range))
    return hf_ae.AutoencoderImageProcessor.from_config(config)


GRADIENT = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "I;16", "I", "F", "HSV"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_keeps_its_brightness(mode, channels):
    """A gray gradient in any mode must come out as that gradient, within what the mode itself loses."""
    values = np.asarray(GRADIENT)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(values.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(values.astype(np.float32) / 255)
    else:
        image = GRADIENT.convert(mode)
    out = processor(channels)(image).pixel_values
    assert out.shape == (1, channels, 8, 8) and out.dtype == torch.float32
    expected = np.asarray(GRADIENT.convert("1").convert("L")) if mode == "1" else values
    assert np.abs(out[0, 0].numpy() * 255 - expected).max() < (8 if mode == "P" else 3)


def test_transparency_is_laid_on_white_and_palettes_too():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert processor(3)(clear).pixel_values.min() == 1
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.info["transparency"] = 1
    assert processor(1)(palette).pixel_values.min() == 1
    assert processor(4)(clear).pixel_values[0, 3].max() == 0


def test_paths_bytes_arrays_and_tensors_give_the_same_pixels(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(rgb)
    image.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    image.save(buffer, "png")
    first = torch.from_numpy(rgb).permute(2, 0, 1)
    files = [image, tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue()]
    arrays = [rgb, rgb.transpose(2, 0, 1), first, (rgb / 255).astype(np.float32), rgb.astype(np.uint16) * 257]
    inputs = files + arrays
    out = processor()(inputs).pixel_values
    torch.testing.assert_close(out, (first.float() / 255).expand(len(inputs), -1, -1, -1))
    torch.testing.assert_close(processor()(np.stack([rgb, rgb])).pixel_values, out[:2])
    signed = processor(pixel_range=(-1.0, 1.0))
    torch.testing.assert_close(signed(image).pixel_values, out[:1] * 2 - 1)
    assert np.array_equal(np.asarray(signed.postprocess(signed(image).pixel_values)[0]), rgb)
    assert signed.postprocess(signed(image).pixel_values, "np").shape == (1, 8, 8, 3)


def test_arrays_of_other_channels_and_kinds_are_converted_as_images_are():
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    torch.testing.assert_close(processor(1)(rgb).pixel_values, processor(1)(Image.fromarray(rgb)).pixel_values)
    torch.testing.assert_close(
        processor(3)(rgb[..., 0]).pixel_values, processor(3)(Image.fromarray(rgb[..., 0])).pixel_values
    )
    clear = np.zeros((8, 8, 4), np.uint8)
    assert processor(3)(clear).pixel_values.min() == 1
    assert processor(1)(np.ones((8, 8), bool)).pixel_values.min() == 1
    with pytest.raises(ValueError, match="height"):
        processor()(rgb, size={"shortest_edge": 8})


def test_other_sizes_are_scaled_to_cover_and_cropped():
    wide = Image.fromarray(
        np.concatenate([np.zeros((20, 20)), np.full((20, 20), 255), np.zeros((20, 20))], 1).astype(np.uint8)
    )
    for image in (wide, np.asarray(wide)):
        out = processor(1, size=8)(image).pixel_values
        assert out.shape == (1, 1, 8, 8) and out[..., 1:-1].mean() > 0.99
    exif = Image.new("L", (8, 4), 0)
    exif.getexif()[0x0112] = 6
    buffer = io.BytesIO()
    exif.save(buffer, "jpeg", exif=exif.getexif())
    assert processor(1)(buffer.getvalue(), do_resize=False).pixel_values.shape == (1, 1, 8, 4)


@pytest.mark.parametrize(
    "bad, words",
    [
        ("missing.png", "does not exist"),
        (b"not an image", "no image file"),
        (np.zeros((5, 5, 7), np.uint8), "channels"),
        (np.full((8, 8), 300.0), "0…1"),
        (np.full((8, 8), np.nan, np.float32), "0…1"),
        (np.full((8, 8), 300, np.int64), "0…255"),
        (np.zeros((8, 8, 2), np.uint8), "channels"),
        (12, "not an image"),
        ([], "No image"),
    ],
)
def test_bad_images_are_named(bad, words):
    with pytest.raises(ValueError, match=words):
        processor()(bad)


def test_truncated_file_is_named(tmp_path):
    GRADIENT.resize((200, 200)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
        processor()(tmp_path / "cut.png")


# Datasets


def sample(split="train"):
    dataset = open_dataset(str(SAMPLE))[split]
    return dataset, image_column(dataset)


def test_memory_holds_exactly_the_images_of_the_dataset():
    dataset, column = sample("test")
    images = ImagesInMemory.load(dataset, column, processor(1, 28))
    assert images.pixels.shape == (500, 1, 28, 28) and images.pixels.dtype == torch.uint8
    for i in (0, 77, 499):
        assert np.array_equal(images.pixels[i, 0].numpy(), np.asarray(dataset[i]["image"]))


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_an_epoch_shows_each_image_once_in_an_order_that_resumes_and_splits(kind):
    dataset, column = sample("test")
    if kind == "memory":
        images = ImagesInMemory.load(dataset, column, processor(1, 28))
    else:
        images = ImageStream(
            open_dataset(str(SAMPLE), streaming=True)["test"], column, processor(1, 28), buffer_size=64
        )
    whole = list(images.batches(20, epoch=3, seed=1))
    assert len(whole) == 25
    as_rows = {b.tobytes() for b in torch.cat(whole).numpy()}
    assert len(as_rows) == len({np.asarray(i).tobytes() for i in dataset[column]})
    assert not torch.equal(whole[0], next(iter(images.batches(20, epoch=4, seed=1))))
    later = list(images.batches(20, epoch=3, seed=1, start=10))
    assert len(later) == 15 and all(torch.equal(a, b) for a, b in zip(later, whole[10:]))
    halves = [list(images.batches(10, epoch=3, seed=1, rank=rank, processes=2)) for rank in (0, 1)]
    for both, one, two in zip(whole, *halves):
        assert {i.tobytes() for i in both.numpy()} == {i.tobytes() for i in torch.cat([one, two]).numpy()}


def test_columns_of_numbers_keep_their_scale():
    values = np.random.default_rng(0).random((3, 8, 8), dtype=np.float32)
    for scale, column in ((1, values), (255, (values * 255).round().astype(int))):
        dataset = datasets.Dataset.from_dict({"image": [v.tolist() for v in column]})
        pixels = ImagesInMemory.load(dataset, "image", processor(1)).pixels
        assert np.abs(pixels[:, 0].numpy() / 255 - column / scale).max() < 0.003
    with pytest.raises(ValueError, match="Row 0"):
        ImagesInMemory.load(datasets.Dataset.from_dict({"image": [[[300] * 8] * 8]}), "image", processor(1))


CLASSES = datasets.ClassLabel(names=["owl", "cat", "dog"])


@pytest.mark.parametrize(
    "kind, train, test, names, indices",
    [
        (datasets.Value("string"), ["cat", "owl", "dog", "cat"], ["owl", "dog"], ["cat", "dog", "owl"], [2, 1]),
        (datasets.Value("int64"), [7, 3, 11], [11, 7], ["3", "7", "11"], [2, 1]),
        (CLASSES, ["cat", "owl", "dog"], ["dog", "cat"], ["owl", "cat", "dog"], [2, 1]),
    ],
    ids=["names", "whole numbers", "ClassLabel"],
)
def test_labels_have_the_same_indices_in_a_split_that_lacks_a_class(kind, train, test, names, indices):
    features = datasets.Features({"kind": kind})
    splits = {n: datasets.Dataset.from_dict({"kind": v}, features) for n, v in (("train", train), ("test", test))}
    found, found_names = read_labels(splits, "test", "kind")
    assert found.tolist() == indices and found_names == names == read_labels(splits, "train", "kind")[1]
    assert [names[i] for i in read_labels(splits, "train", "kind")[0]] == [str(value) for value in train]


def test_columns_that_hold_no_classes_are_refused():
    rows = datasets.Dataset.from_dict({"weight": [0.5, 1.0], "tags": [["a"], ["b"]], "gap": ["a", None]})
    for column in ("weight", "tags", "gap"):
        with pytest.raises(ValueError, match=f"'{column}' holds no classes"):
            read_labels({"train": rows}, "train", column)
    with pytest.raises(ValueError, match=r"no column 'kind': write --label_column with one of weight, tags, gap"):
        read_labels({"train": rows}, "train", "kind")


def test_preparation_of_batches():
    batch = torch.randint(0, 256, (400, 1, 6, 6), dtype=torch.uint8)
    x = to_pixel_values(batch, "cpu", (-1.0, 1.0))
    torch.testing.assert_close(x, batch.float() / 127.5 - 1)
    flipped = to_pixel_values(batch, "cpu", (0.0, 1.0), flip=True)
    same = (flipped == batch / 255).flatten(1).all(1)
    mirrored = (flipped == batch.flip(-1) / 255).flatten(1).all(1)
    assert (same | mirrored).all() and 0.35 < same.float().mean() < 0.65
    binary = to_pixel_values(batch.fill_(64).expand(-1, 1, 6, 6), "cpu", (0.0, 1.0), binarize=True)
    assert set(binary.unique().tolist()) == {0.0, 1.0} and abs(binary.mean() - 64 / 255) < 0.02
    fixed = binarized_once(batch)
    assert torch.equal(fixed, binarized_once(batch)) and set(fixed.unique().tolist()) == {0, 255}


def test_random_shift_moves_whole_images_by_at_most_that_much():
    x = torch.zeros(500, 2, 7, 7)
    x[:, :, 3, 3] = 1
    where = shift_randomly(x, 2).flatten(2).argmax(2)
    assert torch.equal(where[:, 0], where[:, 1])
    rows, columns = where[:, 0] // 7, where[:, 0] % 7
    assert set(rows.tolist()) == set(columns.tolist()) == {1, 2, 3, 4, 5}


def test_random_symmetry_gives_the_eight_of_the_square_and_random_colors_the_six_orders():
    image = torch.arange(27, dtype=torch.uint8).reshape(1, 3, 3, 3)
    turned = [torch.rot90(flipped, turns, (-2, -1)) for flipped in (image, image.flip(-1)) for turns in range(4)]
    wanted = {tuple((x.float() / 255).flatten().tolist()) for x in turned}
    drawn = to_pixel_values(image.expand(400, -1, -1, -1), "cpu", (0.0, 1.0), symmetry=True)
    assert {tuple(x.flatten().tolist()) for x in drawn} == wanted
    orders = to_pixel_values(image.expand(400, -1, -1, -1), "cpu", (0.0, 1.0), colors=True)
    assert len({tuple(x.flatten().tolist()) for x in orders}) == 6
    assert all(torch.allclose(x.sum(0), orders[0].sum(0)) for x in orders)


def test_patch_size_sets_the_grid_and_is_checked():
    fields = dict(network="resnet", image_size=16, hidden_sizes=[8], patch_size=4, latent_channels=2, num_res_blocks=1)
    config = hf_ae.AutoencoderConfig(**fields)
    assert config.latent_shape == [2, 4, 4] and config.block_out_channels == [8, 8, 8]
    with pytest.raises(ValueError, match="power of two"):
        hf_ae.AutoencoderConfig(**{**fields, "patch_size": 3})
    with pytest.raises(ValueError, match="patch_size belongs to network='resnet'"):
        hf_ae.AutoencoderConfig(patch_size=2)
    with pytest.raises(ValueError, match="patch_size=4"):
        hf_ae.AutoencoderConfig(**{**fields, "image_size": 18})


def test_unlabelled_rows_of_another_split_change_no_class():
    train = datasets.Dataset.from_dict({"label": [0, 2, 1]})
    for unlabelled in ([-1, -1], [None, None]):
        splits = {"train": train, "test": datasets.Dataset.from_dict({"label": unlabelled})}
        indices, names = read_labels(splits, "train", "label")
        assert indices.tolist() == [0, 2, 1] and names == ["0", "1", "2"]
    classes = datasets.Features({"label": datasets.ClassLabel(names=["a", "b"])})
    with pytest.raises(ValueError, match="rows without a class"):
        read_labels({"train": datasets.Dataset.from_dict({"label": [0, None]}, features=classes)}, "train", "label")
