"""Pipeline folders: complete, the same images through both doors. test_hub.py pushes one, loads it as a stranger."""

import ast
import inspect
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from command_line import fails
from hub_clients import draw
from tiny_pipelines import autoencoder_kl, pizza_pipeline, pizza_vae, save_pizza
from transformers import AutoModel

import hf_ae
from hf_ae.hub.cards import write_card
from hf_ae.hub.pipeline_folder import code_files, compact, save_pipeline
from hf_ae.hub.push import check_folder, refresh
from hf_ae.pipelines import CaptionPrior, TextToImagePipeline
from hf_ae.pipelines.repo_code import bundle

BUNDLE = "vae/modeling_hf_ae_vae.py"
PARTS = {
    "image_decoder": ["modeling_hf_ae_autoencoder", "AutoencoderModel"],
    "prior": ["caption_prior", "CaptionPrior"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "BertModel"],
    "tokenizer": ["transformers", "TokenizersBackend"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["modeling_hf_ae_vae", "VAEModel"],
}


@pytest.fixture(scope="module")
def vae():
    return pizza_vae()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished folder, as the training script leaves it. Not to be changed."""
    return save_pizza(tmp_path_factory.mktemp("pipelines") / "pizza")


@pytest.fixture(scope="module")
def images(saved):
    return draw(TextToImagePipeline.from_pretrained(saved))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved` to change."""
    return Path(shutil.copytree(saved, tmp_path / "pizza"))


def test_folder_is_complete_and_holds_no_pickle(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "TextToImagePipeline"]
    assert {name: index[name] for name in PARTS} == PARTS
    files = check_folder(saved)
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".py", ".yaml", ".md"}
    code = ["image_decoder/modeling_hf_ae_autoencoder.py", "pipeline.py", "prior/caption_prior.py", BUNDLE]
    assert [name for name in files if name.endswith(".py")] == code
    for name, cls in (("pipeline.py", TextToImagePipeline), ("prior/caption_prior.py", CaptionPrior)):
        assert (saved / name).read_text() == bundle(Path(inspect.getfile(cls)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stored_in_half_precision_load_in_any(dtype, saved, vae):
    options = {} if dtype == "float32" else {"dtype": torch.bfloat16}
    pipe = TextToImagePipeline.from_pretrained(saved, **options)
    assert {part.dtype for part in (pipe.vae, pipe.unet, pipe.text_encoder)} == {getattr(torch, dtype)}
    for name, value in vae.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], value.half().to(pipe.vae.dtype))


def test_both_doors_draw_the_same_images_as_what_was_saved(saved, vae, images):
    other_door = diffusers.DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    assert type(other_door) is not TextToImagePipeline
    assert draw(other_door) == images
    torch.testing.assert_close(torch.tensor(draw(pizza_pipeline(vae))[1]), torch.tensor(images[1]), rtol=0, atol=0.02)
    assert type(AutoModel.from_pretrained(saved, subfolder="vae")) is hf_ae.VAEModel


def test_vae_of_diffusers_is_saved_the_ordinary_way(tmp_path):
    pipe = pizza_pipeline(autoencoder_kl())
    save_pipeline(pipe, tmp_path / "pizza")
    write_card(tmp_path / "pizza")
    weights = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert [name for name in check_folder(tmp_path / "pizza") if name.startswith("vae/")] == weights
    other_door = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pizza", trust_remote_code=True)
    assert draw(other_door) == draw(pipe)


def test_matrices_of_eighths_are_stored_in_a_byte_each_and_load_as_they_were():
    """What float8 holds exactly is stored so; everything else in the dtype that is asked for, integers as they are."""
    coarse, fine = torch.arange(-8.0, 8.0).view(4, 4) / 8, torch.randn(4, 4)
    stored = [compact(tensor, torch.float16) for tensor in (coarse, fine, coarse[0], torch.arange(3))]
    assert [tensor.dtype for tensor in stored] == [torch.float8_e4m3fn, torch.float16, torch.float16, torch.int64]
    assert torch.equal(stored[0].float(), coarse)


@pytest.mark.parametrize("cls", [*hf_ae.MODELS.values(), TextToImagePipeline, CaptionPrior], ids=lambda c: c.__name__)
def test_bundle_of_a_module_is_one_file_that_defines_each_name_once(cls):
    tree = ast.parse(bundle(Path(inspect.getfile(cls))))
    assert not [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assigned = [node.targets for node in tree.body if isinstance(node, ast.Assign)]
    assigned += [[node.target] for node in tree.body if isinstance(node, ast.AnnAssign)]
    names += [
        name.id for targets in assigned for target in targets for name in ast.walk(target) if hasattr(name, "id")
    ]
    assert cls.__name__ in names and not {name for name in names if names.count(name) > 1}
    futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert futures == tree.body[1:2], "after the docstring, and once"


def test_resaved_folder_gets_back_what_diffusers_drops(folder, images):
    expected = {name: (folder / name).read_bytes() for name in [*code_files(folder), "unet/config.json"]}
    TextToImagePipeline.from_pretrained(folder).save_pretrained(folder)
    (folder / "pipeline.py").unlink()
    (folder / BUNDLE).unlink()
    assert "pipeline.py" in check_folder(folder)
    assert {name: (folder / name).read_bytes() for name in expected} == expected
    assert [path.name for path in (folder / "vae").glob("*.py")] == [Path(BUNDLE).name]
    assert draw(diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)) == images


def test_push_leaves_code_of_another_version_alone_and_refresh_renews_it(folder):
    (folder / "pipeline.py").write_text("# an earlier version\n")
    check_folder(folder)
    assert (folder / "pipeline.py").read_text() == "# an earlier version\n"
    refresh(folder)
    assert all((folder / name).read_text() == text for name, text in code_files(folder).items())


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda f: shutil.rmtree(f / "unet"), ["lacks unet/"]),
        (lambda f: (f / "README.md").unlink(), ["lacks README.md"]),
        (lambda f: (f / "model_index.json").write_text("{"), ["model_index.json", "JSON"]),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "Mine"}'), ["model_index.json", "'Mine'"]),
        (lambda f: (f / "vae" / "config.json").write_text("[]"), ["vae/config.json", "JSON"]),
        (lambda f: (f / "vae" / "model.safetensors").write_bytes(b"short"), ["/vae does not load"]),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), ["/unet does not load"]),
        (lambda f: swap_weights(f / "vae", f / "text_encoder"), ["/text_encoder", "missing"]),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), ["/scheduler does not load"]),
        (lambda f: (f / "unet" / "weights.bin").touch(), ["do not belong", "unet/weights.bin"]),
        (lambda f: (f / "README.md").write_text("---\ntags: [\n---\ntext"), ["README.md", "no valid YAML"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_damaged_folder_is_one_clear_line(damage, named, folder, capsys):
    damage(folder)
    fails(capsys, ["push", folder, "--repo", "me/pizza", "--dry-run"], *named)


def swap_weights(source: Path, target: Path):
    shutil.copy(source / "model.safetensors", target / "model.safetensors")


def test_card_says_what_it_is_how_to_use_it_and_keeps_notes_and_licence(folder):
    card = folder / "README.md"
    front = yaml.safe_load(card.read_text().split("---")[1])
    assert front["library_name"] == "diffusers" and front["pipeline_tag"] == "text-to-image"
    assert front["datasets"] == ["me/food"] and "license" not in front
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1) + "\n## Notes\n\nBest warm.\n")
    metrics = {"alignment": {"names": 0.81234, "images": 500}, "command": "python measure.py"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_card(folder)
    text = card.read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    assert text.endswith("\n## Notes\n\nBest warm.\n")
    values = sum(p.numel() for p in TextToImagePipeline.from_pretrained(folder).unet.parameters())
    assert f"| `unet` | diffusers `UNet2DConditionModel` | {values:,} | float16 |" in text
    assert "| alignment: names | 0.8123 |" in text and "| alignment: images | 500 |" in text
    use = ("from hf_ae.pipelines import TextToImagePipeline", "trust_remote_code=True", "hf-ae generate")
    for line in (*use, "python measure.py", "seed: 3"):
        assert line in text
