"""The folder of the Space is exactly what the Hub takes."""

import json
import re
import shutil

import pytest
from hub_server import HubServer
from PIL import Image
from processes import run_python
from shipped import ROOT, as_in_git
from space_server import running_space

from hf_ae.hub.cards import front_matter
from hf_ae.hub.push import check_folder

SPACE = ROOT / "spaces" / "hf-ae"


def test_front_matter_fits_what_is_tested():
    card = front_matter((SPACE / "README.md").read_text())
    assert card["sdk"] == "gradio" and f"gradio=={card['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    assert (
        (SPACE / card["app_file"]).is_file() and card["python_version"] == "3.12" and card["license"] == "apache-2.0"
    )
    assert len(card["short_description"]) <= 60 and len(card["title"]) <= 30
    shipped = {
        path.parent.name for name in ("config", "model_index") for path in ROOT.glob(f"model_cards/*/{name}.json")
    }
    used = set(
        re.findall(r'"((?:mnist|fashion|emoji|photo)-[\w-]+)"', "".join(p.read_text() for p in SPACE.glob("*.py")))
    )
    assert {model.split("/")[1] for model in card["models"]} == shipped & used


def test_requirements_leave_torch_spaces_and_gradio_to_the_hub():
    lines = (SPACE / "requirements.txt").read_text().split("\n")
    assert not [line for line in lines if re.match("torch|spaces|gradio", line)]


def test_the_folder_is_complete_and_its_examples_are_small_and_explained():
    files = check_folder(SPACE)
    examples = [SPACE / name for name in files if name.startswith("examples/")]
    assert sum(path.stat().st_size for path in examples) < 1_500_000
    text = (SPACE / "README.md").read_text()
    for path in examples:
        assert f"`{path.stem}`" in text and Image.open(path).format == "PNG"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda folder: (folder / "requirements.txt").unlink(), "lacks requirements.txt"),
        (lambda folder: (folder / "app.py").unlink(), "lacks app.py"),
        (lambda folder: (folder / "token.txt").write_text("secret"), "do not belong in a Space: token.txt"),
        (lambda folder: (folder / "app.py").write_text("def"), "no Python"),
        (
            lambda folder: (folder / "README.md").write_text("---\nsdk: gradio\n---\ntext"),
            "title, sdk_version, app_file, license is missing",
        ),
    ],
)
def test_a_folder_that_is_no_space_is_refused(tmp_path, change, words):
    for name in ("README.md", "requirements.txt", "app.py"):
        (tmp_path / name).write_bytes((SPACE / name).read_bytes())
    assert len(check_folder(tmp_path)) == 3
    change(tmp_path)
    with pytest.raises(ValueError, match=words):
        check_folder(tmp_path)


def test_as_on_the_hub_models_come_from_an_owner(tmp_path):
    """The folder alone, with no checkout around it, and two models of an owner on the Hub."""
    gradio_client = pytest.importorskip("gradio_client", reason="the Space needs pip install 'hf_ae[space]'")
    shutil.copytree(SPACE, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    with HubServer() as hub:
        for name in ("mnist-ae-2d", "fashion-denoising"):
            hub.add(f"me/{name}", as_in_git(ROOT / "model_cards" / name, tmp_path / name))
        around = hub.client_env(tmp_path / "home") | {"HF_HUB_OFFLINE": "0", "HF_AE_SPACE_MODELS": "me"}
        with running_space(app=tmp_path / "space" / "app.py", **around) as url:
            client = gradio_client.Client(url, verbose=False, download_files=str(tmp_path / "downloads"))
            assert Image.open(client.predict(3, -2, api_name="/plane_point")).size[0] > 27
            clothes = gradio_client.handle_file(str(SPACE / "examples" / "owl.png"))
            assert "trained for this damage" in client.predict(clothes, "Noise", 0.3, api_name="/repair")[1]
            figures, _ = client.predict("MNIST", api_name="/compare")
            with pytest.raises(Exception, match="fashion-vae"):  # that nobody pushed: one line says which
                client.predict(clothes, clothes, api_name="/walk")
    assert "mnist-ae-2d" in figures and "mnist-vae" not in figures
    assert any("me/mnist-ae-2d/resolve" in request for request in hub.requests)


@pytest.fixture(scope="module")
def beside_the_space(tmp_path_factory):
    """What a program gets that runs beside the Space's modules, with no checkout around them."""
    pytest.importorskip("gradio", reason="the Space needs pip install 'hf_ae[space]'")
    folder = tmp_path_factory.mktemp("beside")
    shutil.copytree(SPACE, folder / "space", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("shown", "old/one", "old/two", "fresh"):
        (folder / "files" / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / "files" / name).write_text(name)
    child = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1] + "/space")
import app, serving
folder, found = Path(sys.argv[1]) / "files", []
for where in ("", "me,mnist-vae=you/vae"):
    os.environ["HF_AE_SPACE_MODELS"] = where
    found.append([serving.place("mnist-vae"), serving.available("mnist-vae"), serving.available("other")])
time.sleep(1.2)
(folder / "fresh").write_text("again")
app.sweep(folder, {str(folder / "shown")}, 1)
print(json.dumps([found, sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())]))
"""
    printed = run_python(child, folder, GRADIO_TEMP_DIR=str(folder / "temporary"))
    return json.loads(printed.splitlines()[-1])


def test_without_a_checkout_models_are_those_that_the_readme_names(beside_the_space):
    assert beside_the_space[0] == [["hf-ae/mnist-vae", True, False], ["you/vae", True, False]]


def test_old_files_are_swept_and_fresh_and_shown_ones_stay(beside_the_space):
    assert beside_the_space[1] == ["fresh", "shown"]
