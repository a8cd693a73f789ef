"""Over HTTP, with the unmodified clients: every variant goes to the Hub and comes back, with and without the package.

The clients read HF_ENDPOINT, HF_HOME and HF_TOKEN once, at import, so each client is a process of its own: the source
of self-contained functions `client_…` runs there, and what they return comes back as JSON.
"""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import variants
from hub_server import OTHER, OWNER, OWNER_READ_ONLY, WRONG, HubServer

import hf_ae

FIELDS = dict(variants.VARIANTS.values())
VARIANTS = {model_type: FIELDS[model_type] for model_type in hf_ae.MODELS}
"""model_type -> a small configuration: the last one listed in variants.py."""
PRIVATE = "me/private"
STRANGERS = {"anonymous": False, "wrong": WRONG, "other-user": OTHER}
"""name -> token; False sends none."""
READERS = STRANGERS | {"read-only": OWNER_READ_ONLY, "owner": OWNER}
"""In this order: clients give anyone what their cache already holds."""
NO_WRITERS = STRANGERS | {"read-only": OWNER_READ_ONLY}


# What runs in the clients' processes


def outputs(model, processor) -> dict:
    """What a model says about two fixed pictures. JSON keeps floats exactly."""
    import numpy
    import torch
    from PIL import Image

    pictures = numpy.random.default_rng(0).integers(0, 256, (2, 20, 20), dtype=numpy.uint8)
    with torch.no_grad():
        out = model.eval()(**processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt"))
    return {name: out[name].flatten().tolist() for name in ("loss", "latents", "reconstruction")}


def error_of(function, *args, **kwargs) -> str | None:
    """Name of the exception, and its message; None without one."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def client_push(models, private_id):
    """Push each variant twice; push the last one to a private repo too. `models`: model_type -> fields."""
    import torch
    from huggingface_hub import model_info

    import hf_ae

    pushed = {}
    for model_type, fields in models.items():
        torch.manual_seed(0)
        model_class, repo_id = hf_ae.MODELS[model_type], f"me/{model_type}"
        model = model_class(model_class.config_class(**fields))
        processor, heads = hf_ae.AutoencoderImageProcessor.from_config(model.config), []
        for _ in range(2):
            model.push_to_hub(repo_id)
            processor.push_to_hub(repo_id)
            heads.append(model_info(repo_id).sha)
        pushed[repo_id] = {"outputs": outputs(model, processor), "heads": heads}
    model.push_to_hub(private_id, private=True)
    processor.push_to_hub(private_id)
    return pushed


def client_load(repo_ids):
    """Load with the package, and by its Auto classes alone."""
    from transformers import AutoImageProcessor, AutoModel

    import hf_ae

    loaded = {i: (AutoModel.from_pretrained(i), AutoImageProcessor.from_pretrained(i)) for i in repo_ids}
    assert all(type(model) in hf_ae.MODELS.values() for model, _ in loaded.values())
    return {i: outputs(*pair) for i, pair in loaded.items()}


def client_access(private_id, public_id, readers, writers):
    """token's name -> errors of reading the private repo, and of pushing to the public one and to a new one."""
    from huggingface_hub import hf_hub_download
    from transformers import AutoImageProcessor, AutoModel

    import hf_ae

    reads, writes = {}, {}
    for name, token in readers.items():
        download = error_of(hf_hub_download, private_id, "config.json", token=token)
        reads[name] = [download, error_of(AutoModel.from_pretrained, private_id, token=token)]
    model = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(hidden_sizes=[8], latent_dim=2))
    for name, token in writers.items():
        writes[name] = [error_of(model.push_to_hub, i, token=token) for i in (public_id, f"me/new-{name}")]
    owner = {"token": readers["owner"]}
    loaded = AutoModel.from_pretrained(private_id, **owner), AutoImageProcessor.from_pretrained(private_id, **owner)
    return {"reads": reads, "writes": writes, "outputs": outputs(*loaded)}


def client_load_without_package(repo_ids, try_untrusted):
    """Load with the code in the repos."""
    sys.modules["hf_ae"] = None  # from here on `import hf_ae` raises ImportError
    from transformers import AutoImageProcessor, AutoModel

    loaded = {}
    for i in repo_ids:
        untrusted = (
            [error_of(c.from_pretrained, i) for c in (AutoModel, AutoImageProcessor)] if try_untrusted else None
        )
        model = AutoModel.from_pretrained(i, trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained(i, trust_remote_code=True)
        loaded[i] = {"outputs": outputs(model, processor), "untrusted": untrusted, "module": type(model).__module__}
    return loaded


def client_push_folder(folder, repo_id, private_id, dry_id):
    """Push a model folder dry, twice for real, and to a private repo."""
    from pathlib import Path

    from huggingface_hub import model_info

    import hf_ae
    from hf_ae.hub.cards import write_card
    from hf_ae.hub.push import push_folder

    model = hf_ae.VAEModel(hf_ae.VAEConfig(hidden_sizes=[8], latent_dim=2))
    model.save_pretrained(folder)
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(folder)
    (Path(folder) / "recipe.yaml").write_text("model_type: hf_ae_vae\n")
    write_card(folder)
    push_folder(folder, dry_id, dry_run=True)
    addresses, heads = [], []
    for _ in range(2):
        addresses.append(push_folder(folder, repo_id))
        heads.append(model_info(repo_id).sha)
    push_folder(folder, private_id, private=True)
    return {"addresses": addresses, "heads": heads, "private": model_info(private_id).private}


def client_push_space(folder, repo_id):
    """Push a Space dry, and twice for real."""
    from huggingface_hub import space_info

    from hf_ae.hub.push import push_folder

    push_folder(folder, "me/dry", dry_run=True)
    addresses, heads = set(), []
    for _ in range(2):
        addresses.add(push_folder(folder, repo_id))
        heads.append(space_info(repo_id).sha)
    (address,) = addresses
    return {"address": address, "heads": heads}


def client_dataset(repo_id, folder):
    """Push a parquet file of pictures twice; read it back in both ways: which rows came back as they were."""
    from pathlib import Path

    import numpy
    from datasets import Dataset, Features, Image, Value, load_dataset
    from huggingface_hub import HfApi

    pictures = numpy.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=numpy.uint8)
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": list(pictures), "label": list(range(5))}, features=features)
    rows.to_parquet(Path(folder) / "train-00000-of-00001.parquet")
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset")
    for _ in range(2):
        api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, path_in_repo="data")

    def intact(**options):
        dataset = load_dataset(repo_id, split="train", **options)
        return [row["label"] for row in dataset if numpy.array_equal(row["image"], pictures[row["label"]])]

    return {"plain": intact(), "streaming": intact(streaming=True)}


def client_history(repo_id, wrong):
    """What the Hub promises about revisions, listings, parts of files and refusals, for the client library alone."""
    from huggingface_hub import HfApi, HfFileSystem, hf_hub_download

    api = HfApi()

    def text(revision):
        with open(hf_hub_download(repo_id, "a/b/text.txt", revision=revision)) as file:
            return file.read()

    def upload(content, path="a/b/text.txt", **options):
        return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo_id, **options).oid

    api.create_repo(repo_id)
    first, second = upload(b"one"), upload(b"two")
    upload(b"\0\1\2\3\4\5\6\7", "weights.bin")
    with HfFileSystem().open(f"{repo_id}/weights.bin", block_size=4) as file:
        file.seek(3)
        part = list(file.read(2))
    listed = sorted(entry.path for entry in api.list_repo_tree(repo_id, recursive=True))
    top = sorted(entry.path for entry in api.list_repo_tree(repo_id))
    api.delete_folder("a", repo_id)
    return {
        "user": api.whoami()["name"],
        "texts": [text(first), text(second)],
        "part": part,
        "listed": listed,
        "top": top,
        "left": api.list_repo_files(repo_id),
        "branch": [[branch.name, branch.target_commit] for branch in api.list_repo_refs(repo_id).branches],
        "errors": {
            "create again": error_of(api.create_repo, repo_id),
            "no such revision": error_of(text, "v9"),
            "no such file": error_of(text, "main"),
            "no such folder": error_of(lambda: list(api.list_repo_tree(repo_id, "a"))),
            "no such repo": error_of(api.model_info, "me/nothing"),
            "stale parent": error_of(upload, b"three", parent_commit=first),
            "bad card": error_of(upload, b"---\ntags: [\n---\n", "README.md"),
            "bad token": error_of(HfApi(token=wrong).whoami),
        },
    }


# The tests' side


def run_client(server, home, *steps, token=None, helpers=(), **env):
    """Run `(client_…, its arguments)` one after the other in one process, away from the checkout -> their results."""
    functions = [outputs, error_of, *helpers, *(function for function, _ in steps)]
    calls = [(function.__name__, arguments) for function, arguments in steps]
    run = "results = [globals()[name](**arguments) for name, arguments in json.loads(sys.argv[1])]"
    lines = ["import json\nimport sys", *map(inspect.getsource, functions), run, "print('\\n' + json.dumps(results))"]
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join(lines), json.dumps(calls)],
        env=server.client_env(home, token, OMP_NUM_THREADS="1", **env),
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each client keeps its cache in a folder of its own in here."""
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def pushed(server, folder):
    """What the owner pushed: repo id -> outputs, and the newest commit after each push."""
    step = (client_push, {"models": VARIANTS, "private_id": PRIVATE})
    return run_client(server, folder / "owner", step, token=OWNER)[0]


@pytest.fixture(scope="module")
def with_package(server, folder, pushed):
    """What a client with hf_ae and without a stored token gets: (repo id -> outputs, what each token may do)."""
    access = {"private_id": PRIVATE, "public_id": next(iter(pushed)), "readers": READERS, "writers": NO_WRITERS}
    return run_client(server, folder / "user", (client_load, {"repo_ids": list(pushed)}), (client_access, access))


@pytest.fixture(scope="module")
def without_package(server, folder, pushed):
    """What a client without hf_ae gets: repo id -> outputs, and the errors without trust_remote_code."""
    step = (client_load_without_package, {"repo_ids": list(pushed), "try_untrusted": True})
    return run_client(server, folder / "stranger", step)[0]


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
    step = (client_load_without_package, {"repo_ids": list(pushed), "try_untrusted": False})
    server.stop()
    try:
        (loaded,) = run_client(server, folder / "stranger", step, HF_HUB_OFFLINE="1")
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


def test_push_folder_uploads_all_of_it_in_one_commit(server, folder):
    model = folder / "model"
    ids = {"repo_id": "me/folder", "private_id": "me/private-folder", "dry_id": "me/dry"}
    (said,) = run_client(
        server, folder / "publisher", (client_push_folder, {"folder": str(model), **ids}), token=OWNER
    )
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert {"README.md", "recipe.yaml", "config.json", "model.safetensors", "preprocessor_config.json"} < set(files)
    created, commit = server.commits("me/folder")
    assert {path: data for path, data in server.files("me/folder").items() if path not in created.files} == files
    assert said["heads"] == [commit.oid] * 2, "the second call changed nothing, so it commits nothing"
    assert all(address.endswith("/me/folder") for address in said["addresses"])
    assert said["private"] and len(server.commits("me/private-folder")) == 2
    assert server.commits("me/dry") == []


def test_push_of_a_space_uploads_all_of_it_in_one_commit(server, folder):
    space = Path(hf_ae.__file__).resolve().parent.parent / "spaces" / "hf-ae"
    (said,) = run_client(
        server, folder / "publisher", (client_push_space, {"folder": str(space), "repo_id": "me/space"}), token=OWNER
    )
    created, commit = server.commits("me/space", "space")
    files = {path: data for path, data in server.files("me/space", "space").items() if path not in created.files}
    assert {"README.md", "requirements.txt", "app.py", "style.css", "examples/owl.png"} < set(files)
    assert all((space / path).read_bytes() == data for path, data in files.items())
    assert said["heads"] == [commit.oid] * 2 and said["address"].endswith("/spaces/me/space")
    assert server.commits("me/dry", "space") == server.commits("me/space") == []


def test_dataset_of_images_plain_and_streaming(server, folder):
    (folder / "parquet").mkdir()
    step = (client_dataset, {"repo_id": "me/pictures", "folder": str(folder / "parquet")})
    (read,) = run_client(server, folder / "reader", step, token=OWNER)
    assert read == {"plain": [0, 1, 2, 3, 4], "streaming": [0, 1, 2, 3, 4]}
    assert len(server.commits("me/pictures", "dataset")) == 2


def test_server_keeps_history_and_refuses_as_the_hub_does(server, folder):
    step = (client_history, {"repo_id": "me/history", "wrong": WRONG})
    (seen,) = run_client(server, folder / "api", step, token=OWNER)
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
    assert {name for name in errors if not re.match(expected[name], errors[name] or "")} == set()
