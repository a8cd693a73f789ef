"""What clients of the Hub do, each in a process of its own: `python hub_clients.py CALLS`, where CALLS is JSON.

huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_TOKEN once, at import. `run_client` starts such a process; what the
called functions return comes back as JSON, which keeps floats exactly. They import what they need, so that a client
without hf_ae never imports it.
"""

import json
import subprocess
import sys


def run_client(server, home, *calls, token=None, **env):
    """Call `(function, its arguments)` one after the other in one process, away from the checkout -> their results."""
    named = [(function.__name__, arguments) for function, arguments in calls]
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(named)],
        env=server.client_env(home, token, OMP_NUM_THREADS="1", **env),
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def outputs(model, processor) -> dict:
    """What a model says about two fixed images."""
    import numpy
    import torch
    from PIL import Image

    channels = model.config.num_channels
    arrays = numpy.random.default_rng(0).integers(0, 256, (2, 20, 20, channels), dtype=numpy.uint8)
    images = [Image.fromarray(array.squeeze()) for array in arrays]
    with torch.no_grad():
        out = model.eval()(**processor(images, return_tensors="pt"))
    return {name: out[name].flatten().tolist() for name in ("loss", "latents", "reconstruction")}


def draw(pipe) -> list:
    """Two images of fixed seeds after a preview of them."""
    pipe.set_progress_bar_config(disable=True)
    preview, *_, last = pipe.stream(
        ["a slice of pizza", "pizza"], seed=3, num_inference_steps=2, guidance_scale=3.0, output_type="np"
    )
    return [preview.images.tolist(), last.images.tolist()]


def error_of(function, *args, **kwargs) -> str | None:
    """Name of the exception, and its message; None without one."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# The owner, who has hf_ae


def push_variants(models, private_id):
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


def push_model_folder(folder, repo_id, private_id, dry_id):
    """Push a model folder, a sampler beside the model, dry, twice for real, and to a private repo."""
    from pathlib import Path

    import torch
    from huggingface_hub import model_info

    import hf_ae
    from hf_ae.hub.cards import write_card
    from hf_ae.hub.push import push_folder
    from hf_ae.latents import sampling

    model = hf_ae.VAEModel(hf_ae.VAEConfig(hidden_sizes=[8], latent_dim=2))
    model.save_pretrained(folder)
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(folder)
    (Path(folder) / "recipe.yaml").write_text("model_type: hf_ae_vae\n")
    sampling.fit(torch.randn(9, 2), "gaussian").save(folder)
    write_card(folder)
    push_folder(folder, dry_id, dry_run=True)
    addresses, heads = [], []
    for _ in range(2):
        addresses.append(push_folder(folder, repo_id))
        heads.append(model_info(repo_id).sha)
    push_folder(folder, private_id, private=True)
    return {"addresses": addresses, "heads": heads, "private": model_info(private_id).private}


def push_space(folder, repo_id):
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


def push_folders(folders):
    """Push finished folders, by the command line. `folders`: repo id -> folder; returns the exit codes."""
    from hf_ae_cli import main

    codes = {}
    for repo_id, folder in folders.items():
        try:
            main(["push", folder, "--repo", repo_id])
        except SystemExit as stop:
            codes[repo_id] = stop.code
    return codes


def upload(folder, repo_id):
    """A folder as it is, unchecked."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder)


# Users who have hf_ae


def load_variants(repo_ids):
    """Load with the package, and by its Auto classes alone."""
    from transformers import AutoImageProcessor, AutoModel

    import hf_ae

    loaded = {i: (AutoModel.from_pretrained(i), AutoImageProcessor.from_pretrained(i)) for i in repo_ids}
    assert all(type(model) in hf_ae.MODELS.values() for model, _ in loaded.values())
    return {i: outputs(*pair) for i, pair in loaded.items()}


def try_access(private_id, public_id, readers, writers):
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


def find_samplers(repo_ids):
    """What an evaluation draws latents from where none is asked for: the kind, or None."""
    from hf_ae.evaluation.generation import find_sampler

    found = {i: find_sampler(None, i, None, lambda: None) for i in repo_ids}
    return {i: sampler and sampler.kind for i, sampler in found.items()}


def load_pipeline(repo_id):
    """Load with the package, and again from the cache alone."""
    from hf_ae.pipelines import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained(repo_id)
    again = TextToImagePipeline.from_pretrained(repo_id, local_files_only=True)
    return {"vae": type(pipe.vae).__name__, "name": pipe.name_or_path, "images": draw(pipe), "again": draw(again)}


# Strangers, who have not


def forget_hf_ae():
    """From here on `import hf_ae` raises ImportError."""
    assert "hf_ae" not in sys.modules
    sys.modules["hf_ae"] = None


def load_models(repo_ids, try_untrusted):
    """Load with the code in the repos."""
    from transformers import AutoImageProcessor, AutoModel

    loaded = {}
    for i in repo_ids:
        errors = [error_of(c.from_pretrained, i) for c in (AutoModel, AutoImageProcessor)] if try_untrusted else None
        model = AutoModel.from_pretrained(i, trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained(i, trust_remote_code=True)
        loaded[i] = {"outputs": outputs(model, processor), "untrusted": errors, "module": type(model).__module__}
    return loaded


def load_pipelines(places):
    """What each place, a folder or a Hub id, gives: images, and latents decoded by the VAE alone where it is ours."""
    import torch
    from diffusers import DiffusionPipeline
    from transformers import AutoModel

    loaded = {}
    for place in places:
        refused = error_of(DiffusionPipeline.from_pretrained, place)
        pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
        found = {"refused": refused, "class": type(pipe).__name__, "vae": type(pipe.vae).__module__}
        if found["vae"].startswith("diffusers_modules."):
            vae = AutoModel.from_pretrained(place, subfolder="vae", trust_remote_code=True)
            with torch.no_grad():
                found["decoded"] = vae.decode(torch.ones(1, *vae.config.latent_shape)).sample.tolist()
        loaded[place] = {**found, "images": draw(pipe)}
    return loaded


# Anyone


def push_and_read_dataset(repo_id, folder):
    """Push a parquet file of images twice; read it back in both ways: which rows came back as they were."""
    from pathlib import Path

    import numpy
    from datasets import Dataset, Features, Image, Value, load_dataset
    from huggingface_hub import HfApi

    images = numpy.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=numpy.uint8)
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": list(images), "label": list(range(5))}, features=features)
    rows.to_parquet(Path(folder) / "train-00000-of-00001.parquet")
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset")
    for _ in range(2):
        api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, path_in_repo="data")

    def intact(**options):
        dataset = load_dataset(repo_id, split="train", **options)
        return [row["label"] for row in dataset if numpy.array_equal(row["image"], images[row["label"]])]

    return {"plain": intact(), "streaming": intact(streaming=True)}


def encode_and_push(model, folder, repo_id):
    """Encode a dataset of the Hub with the command line, upload the latents and load them by their id."""
    from command_line import runs
    from datasets import load_dataset

    words = ["encode", model, "--dataset_name", "me/images", "-o", folder]
    runs(*words, "--keep_columns", "label", "--push_to_hub", repo_id)
    rows = load_dataset(repo_id)
    return {"splits": list(rows), **rows["train"].to_dict()}


def use_history(repo_id, wrong):
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


if __name__ == "__main__":
    results = [globals()[name](**arguments) for name, arguments in json.loads(sys.argv[1])]
    print("\n" + json.dumps(results))
