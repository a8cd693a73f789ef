"""Over HTTP, with the unmodified clients: models, pipelines, Spaces and datasets go to the Hub and come back.

With and without hf_ae: an owner pushes, a user with the package and a stranger without it load; each is one process.
"""

import json
import re

import hub_clients
import pytest
import torch
import variants
from hub_clients import run_client
from hub_server import OTHER, OWNER, OWNER_READ_ONLY, WRONG, HubServer
from shipped import MODELS, PIPELINES, ROOT, as_in_git
from tiny_pipelines import pipeline, save_pizza, ship, vae_of_hf_ae
from transformers import AutoImageProcessor, AutoModel

import hf_ae
from hf_ae.hub.push import check_folder
from hf_ae.pipelines import TextToImagePipeline

FIELDS = dict(variants.VARIANTS.values())
VARIANTS = {model_type: FIELDS[model_type] for model_type in hf_ae.MODELS}
"""model_type -> a small configuration: the last one listed in variants.py."""
PRIVATE = "me/private"
STRANGERS = {"anonymous": False, "wrong": WRONG, "other-user": OTHER}
"""name -> token; False sends none."""
READERS = STRANGERS | {"read-only": OWNER_READ_ONLY, "owner": OWNER}
"""In this order: clients give anyone what their cache already holds."""
NO_WRITERS = STRANGERS | {"read-only": OWNER_READ_ONLY}
SHIPPED, SHIPPED_PIPELINES = [path.name for path in MODELS], [path.name for path in PIPELINES]


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each client keeps its cache in a folder of its own in here."""
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def shipped(folder):
    """Folders of the checkout as git has them: copies without the code that `hf-ae push` writes."""
    (folder / "shipped").mkdir()
    return {path.name: as_in_git(path, folder / "shipped" / path.name) for path in MODELS + PIPELINES}


@pytest.fixture(scope="module")
def pizza(folder):
    return save_pizza(folder / "pizza")


@pytest.fixture(scope="module")
def owner(server, folder, shipped, pizza):
    """What the owner's process did: name of the function -> what it returned."""
    for name in ("parquet", "history"):
        (folder / name).mkdir()
    ids = {"repo_id": "me/folder", "private_id": "me/private-folder", "dry_id": "me/dry"}
    ready = {f"me/{name}": str(path) for name, path in shipped.items()} | {"me/pizza": str(pizza)}
    drawer = ship(pipeline(vae=vae_of_hf_ae), folder / "drawer")
    for name in ("unet/model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "unet/x.onnx", "safety/x.json"):
        (drawer / name).parent.mkdir(exist_ok=True)
        (drawer / name).write_bytes(b"not needed")
    calls = [
        (hub_clients.push_variants, {"models": VARIANTS, "private_id": PRIVATE}),
        (hub_clients.push_model_folder, {"folder": str(folder / "model"), **ids}),
        (hub_clients.push_space, {"folder": str(ROOT / "spaces" / "hf-ae"), "repo_id": "me/space"}),
        (hub_clients.push_folders, {"folders": ready}),
        (hub_clients.upload, {"folder": str(drawer), "repo_id": "me/drawer"}),
        (hub_clients.push_and_read_dataset, {"repo_id": "me/images", "folder": str(folder / "parquet")}),
        (hub_clients.use_history, {"repo_id": "me/history", "wrong": WRONG}),
        (hub_clients.push_folders, {"folders": {"me/pizza": str(pizza)}}),
    ]
    *results, again = run_client(server, folder / "owner", *calls, token=OWNER)
    assert set(again.values()) == {0}
    return {function.__name__: result for (function, _), result in zip(calls, results)}


@pytest.fixture(scope="module")
def pushed(owner):
    """What the owner pushed: repo id -> outputs, and the newest commit after each push."""
    return owner["push_variants"]


@pytest.fixture(scope="module")
def with_package(server, folder, pushed):
    """What a client with hf_ae and without a token gets: models, what each token may do, a pipeline, samplers."""
    access = {"private_id": PRIVATE, "public_id": next(iter(pushed)), "readers": READERS, "writers": NO_WRITERS}
    calls = [
        (hub_clients.load_variants, {"repo_ids": list(pushed)}),
        (hub_clients.try_access, access),
        (hub_clients.load_pipeline, {"repo_id": "me/drawer"}),
        (hub_clients.find_samplers, {"repo_ids": ["me/folder", "me/hf_ae_vae"]}),
    ]
    return run_client(server, folder / "user", *calls)


@pytest.fixture(scope="module")
def stranger(server, folder, pushed, pizza, shipped):
    """What a client without hf_ae gets: (of each variant, of each shipped model, of each pipeline)."""
    plain = ship(pipeline(), folder / "plain")
    pipelines = ["me/pizza", str(pizza), str(plain), *(f"me/{name}" for name in SHIPPED_PIPELINES)]
    calls = [
        (hub_clients.forget_hf_ae, {}),
        (hub_clients.load_models, {"repo_ids": list(pushed), "try_untrusted": True}),
        (hub_clients.load_models, {"repo_ids": [f"me/{name}" for name in SHIPPED], "try_untrusted": False}),
        (hub_clients.load_pipelines, {"places": pipelines}),
    ]
    return run_client(server, folder / "stranger", *calls)[1:]


@pytest.fixture(scope="module")
def without_package(stranger):
    """What a client without hf_ae gets: repo id -> outputs, and the errors without trust_remote_code."""
    return stranger[0]


# Models


each_variant = pytest.mark.parametrize("repo_id", [f"me/{model_type}" for model_type in VARIANTS])


@each_variant
def test_push_makes_one_commit_each_and_pushing_the_same_again_none(repo_id, server, pushed):
    assert len(server.commits(repo_id)) == 3, "the repo's creation, the model, the processor"
    assert pushed[repo_id]["heads"] == [server.commits(repo_id)[-1].oid] * 2


@each_variant
def test_auto_classes_give_back_the_pushed_model(repo_id, pushed, with_package):
    assert with_package[0][repo_id] == pushed[repo_id]["outputs"]


@each_variant
def test_model_runs_where_the_package_is_not_installed(repo_id, pushed, without_package):
    assert without_package[repo_id]["module"].startswith("transformers_modules.")
    assert without_package[repo_id]["outputs"] == pushed[repo_id]["outputs"]


@each_variant
def test_each_client_downloads_the_weights_once(repo_id, server, pushed, with_package, without_package):
    weights = f"GET /{repo_id}/resolve/{pushed[repo_id]['heads'][0]}/model.safetensors"
    assert server.requests.count(weights) == 2


@each_variant
def test_code_of_a_repo_runs_only_when_trusted(repo_id, without_package):
    for error in without_package[repo_id]["untrusted"]:
        assert error.startswith("ValueError") and "trust_remote_code=True" in error


def test_offline_reuse_from_the_cache(server, folder, pushed, without_package):
    load = (hub_clients.load_models, {"repo_ids": list(pushed), "try_untrusted": False})
    server.stop()
    try:
        _, loaded = run_client(server, folder / "stranger", (hub_clients.forget_hf_ae, {}), load, HF_HUB_OFFLINE="1")
    finally:
        server.start()
    assert {i: found["outputs"] for i, found in loaded.items()} == {i: found["outputs"] for i, found in pushed.items()}


def test_private_repo_is_there_for_its_owner_only(pushed, with_package):
    reads, outputs = with_package[1]["reads"], with_package[1]["outputs"]
    assert reads["owner"] == reads["read-only"] == [None, None]
    assert outputs == list(pushed.values())[-1]["outputs"]
    for name in ("anonymous", "other-user"):
        download, load = reads[name]
        assert download.startswith("RepositoryNotFoundError")
        assert load.startswith("OSError") and "not a valid model identifier" in load
    assert all("Invalid credentials" in error for error in reads["wrong"])


@pytest.mark.parametrize("name, status", [("anonymous", 401), ("wrong", 401), ("read-only", 403), ("other-user", 403)])
def test_push_without_the_right_to_stores_nothing(name, status, server, pushed, with_package):
    for error in with_package[1]["writes"][name]:
        assert error.startswith("HfHubHTTPError") and str(status) in error
    assert server.commits(f"me/new-{name}") == []
    public_id, found = next(iter(pushed.items()))
    assert server.commits(public_id)[-1].oid == found["heads"][0]


def test_push_folder_uploads_all_of_it_in_one_commit(server, folder, owner):
    model, pushed = folder / "model", owner["push_model_folder"]
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    needed = {"README.md", "recipe.yaml", "config.json", "preprocessor_config.json"}
    assert needed | {"model.safetensors", "sampler.safetensors"} < set(files)
    created, commit = server.commits("me/folder")
    assert {path: data for path, data in server.files("me/folder").items() if path not in created.files} == files
    assert pushed["heads"] == [commit.oid] * 2, "the second call changed nothing, so it commits nothing"
    assert all(address.endswith("/me/folder") for address in pushed["addresses"])
    assert pushed["private"] and len(server.commits("me/private-folder")) == 2
    assert server.commits("me/dry") == []


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model_is_pushed_with_its_code_and_runs_where_the_package_is_not_installed(
    name, server, owner, stranger, shipped
):
    assert owner["push_folders"][f"me/{name}"] == 0
    uploaded = server.files(f"me/{name}")
    for path in (path for path in uploaded if path.endswith(".py")):
        assert uploaded[path].decode() == (ROOT / "hf_ae" / "models" / path).read_text()
    config = json.loads(uploaded["config.json"])
    assert {f"{entry.split('.')[0]}.py" for entry in config["auto_map"].values()} < set(uploaded)
    found = stranger[1][f"me/{name}"]
    assert found["module"].startswith("transformers_modules.")
    model, processor = (c.from_pretrained(ROOT / "model_cards" / name) for c in (AutoModel, AutoImageProcessor))
    assert type(model) in hf_ae.MODELS.values()
    assert found["outputs"] == hub_clients.outputs(model, processor)


def test_the_sampler_beside_a_model_is_found(with_package):
    assert with_package[3] == {"me/folder": "gaussian", "me/hf_ae_vae": None}


# Pipelines


def test_a_pipeline_folder_makes_one_commit_of_exactly_its_files(server, owner, pizza):
    assert owner["push_folders"]["me/pizza"] == 0
    created, commit = server.commits("me/pizza")
    uploaded = {name: file.data for name, file in commit.files.items() if name not in created.files}
    assert uploaded == {name: (pizza / name).read_bytes() for name in check_folder(pizza)}


@pytest.mark.parametrize("name", ["pizza", *SHIPPED_PIPELINES])
def test_a_pipeline_draws_where_the_package_is_not_installed(name, owner, stranger, pizza):
    assert owner["push_folders"][f"me/{name}"] == 0
    place = pizza if name == "pizza" else ROOT / "model_cards" / name
    images = hub_clients.draw(TextToImagePipeline.from_pretrained(place))
    vae = AutoModel.from_pretrained(place, subfolder="vae")
    with torch.no_grad():
        decoded = vae.decode(torch.ones(1, *vae.config.latent_shape)).sample
    for found in [stranger[2][f"me/{name}"], *([stranger[2][str(pizza)]] if name == "pizza" else [])]:
        assert found["vae"].startswith("diffusers_modules.") and found["class"] == "TextToImagePipeline"
        assert "trust_remote_code=True" in found["refused"]
        for result, expected in zip(found["images"], images):
            torch.testing.assert_close(torch.tensor(result), torch.tensor(expected), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(found["decoded"]), decoded, rtol=0, atol=1e-5)


def test_with_the_package_only_what_is_needed_travels_and_no_code(server, folder, with_package):
    found = with_package[2]
    assert (found["vae"], found["name"]) == ("VAEModel", "me/drawer") and found["images"] == found["again"]
    fetched = [re.fullmatch(r"GET /me/drawer/resolve/\w+/(.*)", request) for request in server.requests]
    fetched = {match[1] for match in fetched if match}
    needed = {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert needed | {"vae/model.safetensors"} <= fetched
    assert not [name for name in fetched if re.search(r"\.(py|bin|onnx)$|fp16|safety", name)]


def test_a_pipeline_with_a_vae_of_diffusers_draws_where_the_package_is_not_installed(folder, stranger):
    found = stranger[2][str(folder / "plain")]
    assert found["class"] == "TextToImagePipeline" and found["vae"].startswith("diffusers.models.")
    images = hub_clients.draw(TextToImagePipeline.from_pretrained(folder / "plain"))
    torch.testing.assert_close(torch.tensor(found["images"][1]), torch.tensor(images[1]), rtol=0, atol=1e-5)


# Spaces, datasets, and the server itself


def test_push_of_a_space_uploads_all_of_it_in_one_commit(server, owner):
    space, pushed = ROOT / "spaces" / "hf-ae", owner["push_space"]
    created, commit = server.commits("me/space", "space")
    files = {path: data for path, data in server.files("me/space", "space").items() if path not in created.files}
    assert {"README.md", "requirements.txt", "app.py", "style.css", "examples/owl.png"} < set(files)
    assert all((space / path).read_bytes() == data for path, data in files.items())
    assert pushed["heads"] == [commit.oid] * 2 and pushed["address"].endswith("/spaces/me/space")
    assert server.commits("me/dry", "space") == server.commits("me/space") == []


def test_dataset_of_images_plain_and_streaming(server, owner):
    assert owner["push_and_read_dataset"] == {"plain": [0, 1, 2, 3, 4], "streaming": [0, 1, 2, 3, 4]}
    assert len(server.commits("me/images", "dataset")) == 2


def test_server_keeps_history_and_refuses_as_the_hub_does(server, owner):
    seen = dict(owner["use_history"])
    commits, errors = server.commits("me/history"), seen.pop("errors")
    assert len(commits) == 5 and len({commit.oid for commit in commits}) == 5
    assert seen == {
        "user": "me",
        "texts": ["one", "two"],
        "part": [3, 4],
        "listed": [".gitattributes", "a", "a/b", "a/b/text.txt", "weights.bin"],
        "top": [".gitattributes", "a", "weights.bin"],
        "left": [".gitattributes", "weights.bin"],
        "branch": [["main", commits[-1].oid]],
    }
    expected = {
        "create again": "HfHubHTTPError: .*409 Conflict",
        "no such revision": "RevisionNotFoundError",
        "no such file": "RemoteEntryNotFoundError",
        "no such folder": "RemoteEntryNotFoundError",
        "no such repo": "RepositoryNotFoundError",
        "stale parent": "HfHubHTTPError: .*412 Precondition Failed",
        "bad card": "ValueError: Invalid metadata in README.md",
        "bad token": "HfHubHTTPError: Invalid user token",
    }
    assert set(errors) == set(expected)
    assert {name for name in errors if not re.match(expected[name], errors[name] or "no error")} == set()
