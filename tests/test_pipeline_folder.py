"""A pipeline folder: complete, the same pictures through both doors, with and without hf_ae, from a folder and over HTTP."""

import ast
import inspect
import json
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from hub_server import OWNER, HubServer
from test_hub import error_of, run_client
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

import hf_ae
from hf_ae.hub.cards import write_card
from hf_ae.hub.pipeline_folder import bundle, code_files, save_pipeline
from hf_ae.hub.push import check_folder, refresh
from hf_ae.pipelines import CaptionPrior, TextToImagePipeline
from hf_ae_cli import main

BUNDLE = "vae/modeling_hf_ae_vae.py"
PARTS = {
    "image_decoder": ["modeling_hf_ae_autoencoder", "AutoencoderModel"],
    "prior": ["pipeline", "CaptionPrior"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "BertModel"],
    "tokenizer": ["transformers", "TokenizersBackend"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["modeling_hf_ae_vae", "VAEModel"],
}


def make_pipeline(vae) -> TextToImagePipeline:
    """Small random components around a VAE with two levels and four latent channels."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "a", "slice", "of", "pizza"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=8
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    prior = CaptionPrior(["a slice", "pizza"], num_texts=3, num_links=3, width=16)
    links = torch.tensor([[0, 1, 1], [0, 1, 2]], dtype=torch.int32)
    prior.load_state_dict({"vectors": torch.randn(3, 16), "means": torch.randn(2, 16), "links": links})
    return TextToImagePipeline(
        vae=vae.eval(),
        prior=prior,
        text_encoder=BertModel(BertConfig(vocab_size=len(words), **sizes)).eval(),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8
        ),
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        default_num_inference_steps=2,
        default_guidance_scale=3.0,
    )


def draw(pipe) -> list:
    """Two pictures of fixed seeds after a preview of them. JSON keeps floats exactly."""
    pipe.set_progress_bar_config(disable=True)
    preview, *_, last = pipe.stream(["a slice of pizza", "pizza"], seed=3, output_type="np")
    return [preview.images.tolist(), last.images.tolist()]


def client_without_package(place):
    """What `place`, a folder or a Hub id, gives to someone without hf_ae: two pictures, and a code decoded by the VAE alone."""
    sys.modules["hf_ae"] = None  # from here on `import hf_ae` raises ImportError
    import torch
    from diffusers import DiffusionPipeline
    from transformers import AutoModel

    refused = error_of(DiffusionPipeline.from_pretrained, place)
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    vae = AutoModel.from_pretrained(place, subfolder="vae", trust_remote_code=True)
    with torch.no_grad():
        picture = vae.decode(torch.ones(1, 4, 8, 8)).sample.tolist()
    return {"pictures": draw(pipe), "module": type(pipe.vae).__module__, "decoded": picture, "refused": refused}


FIELDS = dict(
    network="resnet", image_size=16, num_channels=3, hidden_sizes=[8, 8], latent_channels=4, pixel_range=[-1.0, 1.0]
)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return hf_ae.VAEModel(hf_ae.VAEConfig(**FIELDS))


@pytest.fixture(scope="module")
def saved(vae, tmp_path_factory):
    """A finished folder, as the training script leaves it. Not to be changed."""
    folder = tmp_path_factory.mktemp("pipelines") / "pizza"
    pipe = make_pipeline(vae)
    pipe.image_decoder = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(**FIELDS)).eval()
    save_pipeline(pipe, folder, "float16")
    (folder / "recipe.yaml").write_text("dataset_name: me/food\nseed: 3\n")
    write_card(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(saved):
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
    code = ["image_decoder/modeling_hf_ae_autoencoder.py", "pipeline.py", "prior/pipeline.py", BUNDLE]
    assert [name for name in files if name.endswith(".py")] == code
    for name in ("pipeline.py", "prior/pipeline.py"):
        assert (saved / name).read_text() == Path(inspect.getfile(TextToImagePipeline)).read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stored_in_half_precision_load_in_any(dtype, saved, vae):
    options = {} if dtype == "float32" else {"dtype": torch.bfloat16}
    pipe = TextToImagePipeline.from_pretrained(saved, **options)
    assert {part.dtype for part in (pipe.vae, pipe.unet, pipe.text_encoder)} == {getattr(torch, dtype)}
    for name, value in vae.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], value.half().to(pipe.vae.dtype))


def test_both_doors_draw_the_same_pictures_as_what_was_saved(saved, vae, pictures):
    other_door = diffusers.DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    assert type(other_door) is not TextToImagePipeline
    assert draw(other_door) == pictures
    torch.testing.assert_close(torch.tensor(draw(make_pipeline(vae))[1]), torch.tensor(pictures[1]), rtol=0, atol=0.02)
    assert type(AutoModel.from_pretrained(saved, subfolder="vae")) is hf_ae.VAEModel


def test_without_the_package_from_a_folder_and_from_the_hub(saved, pictures, tmp_path):
    """`hf-ae push` makes one commit of exactly the folder, a second push none; a stranger draws the same pictures."""
    with HubServer() as server:
        push = (client_push, {"folder": str(saved)})
        assert run_client(server, tmp_path / "owner", push, push, token=OWNER) == [0, 0]
        created, commit = server.commits("me/pizza")
        uploaded = {name: file.data for name, file in commit.files.items() if name not in created.files}
        assert uploaded == {name: (saved / name).read_bytes() for name in check_folder(saved)}
        steps = [(client_without_package, {"place": place}) for place in (str(saved), "me/pizza")]
        local, remote = run_client(server, tmp_path / "stranger", *steps, helpers=[draw])
    with torch.no_grad():
        decoded = AutoModel.from_pretrained(saved, subfolder="vae").decode(torch.ones(1, 4, 8, 8)).sample.tolist()
    for found in (local, remote):
        for name, expected in (
            ("pictures", pictures),
            ("decoded", decoded),
        ):  # threads may differ between the processes
            assert torch.allclose(torch.tensor(found[name]), torch.tensor(expected), atol=1e-5), name
        assert found["module"].startswith("diffusers_modules.")
        assert "trust_remote_code=True" in found["refused"]


def client_push(folder):
    """`hf-ae push`'s exit code."""
    from hf_ae_cli import main

    try:
        main(["push", folder, "--repo", "me/pizza"])
    except SystemExit as stop:
        return stop.code


def test_vae_of_diffusers_is_saved_the_ordinary_way(tmp_path):
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    pipe = make_pipeline(vae)
    save_pipeline(pipe, tmp_path / "pizza")
    write_card(tmp_path / "pizza")
    files = check_folder(tmp_path / "pizza")
    assert [name for name in files if name.startswith("vae/")] == [
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert draw(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pizza", trust_remote_code=True)) == draw(pipe)


@pytest.mark.parametrize("model_type", hf_ae.MODELS)
def test_bundle_of_a_model_is_one_file_that_defines_each_name_once(model_type):
    tree = ast.parse(bundle(Path(inspect.getfile(hf_ae.MODELS[model_type]))))
    assert not [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    names += [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    names += {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert len(names) == len(set(names))


def test_resaved_folder_gets_back_what_diffusers_drops(folder, pictures):
    expected = {name: (folder / name).read_bytes() for name in [*code_files(folder), "unet/config.json"]}
    TextToImagePipeline.from_pretrained(folder).save_pretrained(folder)
    (folder / "pipeline.py").unlink()
    (folder / BUNDLE).unlink()
    assert "pipeline.py" in check_folder(folder)
    assert {name: (folder / name).read_bytes() for name in expected} == expected
    assert [path.name for path in (folder / "vae").glob("*.py")] == [Path(BUNDLE).name]
    assert draw(diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)) == pictures


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
        (
            lambda f: shutil.copy(f / "vae/model.safetensors", f / "text_encoder/model.safetensors"),
            ["/text_encoder", "missing"],
        ),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), ["/scheduler does not load"]),
        (
            lambda f: (f / "unet" / "diffusion_pytorch_model.bin").touch(),
            ["do not belong", "unet/diffusion_pytorch_model.bin"],
        ),
        (lambda f: (f / "README.md").write_text("---\ntags: [\n---\ntext"), ["README.md", "tags"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_damaged_folder_is_one_clear_line(damage, named, folder, capsys):
    damage(folder)
    with pytest.raises(SystemExit) as stop:
        main(["push", str(folder), "--repo", "me/pizza", "--dry-run"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    assert all(text in lines[0] for text in named), lines


def test_card_says_what_it_is_how_to_use_it_and_keeps_notes_and_licence(folder):
    card = folder / "README.md"
    front = yaml.safe_load(card.read_text().split("---")[1])
    assert (
        front["library_name"] == "diffusers"
        and front["pipeline_tag"] == "text-to-image"
        and front["datasets"] == ["me/food"]
    )
    assert "license" not in front
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1) + "\n## Notes\n\nBest warm.\n")
    (folder / "metrics.json").write_text(
        '{"alignment": {"names": 0.81234, "pictures": 500}, "command": "python measure.py"}'
    )
    write_card(folder)
    text = card.read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    assert text.endswith("\n## Notes\n\nBest warm.\n")
    values = sum(p.numel() for p in TextToImagePipeline.from_pretrained(folder).unet.parameters())
    assert f"| `unet` | diffusers `UNet2DConditionModel` | {values:,} | float16 |" in text
    assert (
        "| alignment: names | 0.8123 |" in text
        and "| alignment: pictures | 500 |" in text
        and "python measure.py" in text
    )
    for line in (
        "from hf_ae.pipelines import TextToImagePipeline",
        "trust_remote_code=True",
        "hf-ae generate",
        "seed: 3",
    ):
        assert line in text
