"""Cards and figures: what a person wrote stays, fuller figures stay, and huggingface_hub reads what is written."""

import json
import shutil

import pytest
import torch
import yaml
from command_line import fails, runs
from conftest import SAMPLE
from huggingface_hub import ModelCard, eval_result_entries_to_yaml, parse_eval_result_entries
from shipped import MODELS
from variants import make

import hf_ae
from hf_ae import train
from hf_ae.evaluation.record import combined
from hf_ae.hub.card_parts import BEGIN, END
from hf_ae.hub.cards import MADE_WITH, write_card
from hf_ae.hub.eval_results import check_eval_results, write_eval_results
from hf_ae.hub.push import check_folder
from hf_ae.loading import load_model

SMALL = ["--dataset_name", str(SAMPLE), "--tasks", "reconstruction", "--train_split", "none"]


@pytest.fixture
def folder(tmp_path):
    """A model as `save_pretrained` leaves it."""
    model = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(hidden_sizes=[16], latent_dim=4))
    model.save_pretrained(tmp_path / "mine")
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_readme_that_a_person_wrote_stays_and_gets_a_section(folder):
    card, front = folder / "README.md", "---\nlanguage: de\nlicense: mit\ntags:\n- art\n---\n\n"
    card.write_text(f"{front}# Mein Modell\n\n## Use\n\nJa.\n")
    runs("evaluate", folder, *SMALL, "--max_images", 30)
    text = card.read_text()
    assert "# Mein Modell\n\n## Use\n\nJa.\n\n" + BEGIN in text and text.rstrip().endswith(END)
    data = ModelCard.load(card).data
    assert (data.language, data.license, data.pipeline_tag) == ("de", "mit", "image-feature-extraction")
    assert {"art", "hf_ae"} <= set(data.tags)
    card.write_text(text.replace("Ja.", "Nein.") + "\nAm Ende.\n")
    write_card(folder)
    again = card.read_text()
    assert again == text.replace("Ja.", "Nein.") + "\nAm Ende.\n" and again.count(BEGIN) == 1


def test_a_card_of_an_earlier_version_is_written_anew_but_for_sections_it_did_not_write(folder):
    write_card(folder)
    card = folder / "README.md"
    text = card.read_text()
    assert BEGIN in text
    old = text.replace(f"{BEGIN}\n\n", "").replace(f"{END}\n", "") + "\n## Limits\n\nSmall.\n\n## Notes\n\nKept.\n"
    card.write_text(old.replace("## Use", "## Use\n\nOutdated."))
    write_card(folder)
    assert card.read_text() == f"{text}\n## Limits\n\nSmall.\n\n## Notes\n\nKept.\n"


def test_fewer_images_never_take_the_place_of_more_unless_asked_for(folder, capsys):
    runs("evaluate", folder, *SMALL, "--max_images", 40)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    capsys.readouterr()
    runs("evaluate", folder, *SMALL, "--max_images", 1)
    assert "keeps what was measured on more images (reconstruction of 40 images)" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    runs("evaluate", folder, *SMALL, "--max_images", 1, "--replace")
    assert json.loads((folder / "metrics.json").read_text())["images"] == 1


def test_figures_of_other_tasks_stay_where_they_are_of_the_same_data():
    data = dict(dataset="d", split="test", binarized=False)
    old = data | dict(images=100, command="a", reconstruction={"mse": 1.0}, pca={"mse": 2.0})
    old |= dict(generation={"images": 90, "fid": 1.0}, kodak={"pictures": 24})
    alone = data | dict(images=50, command="b", generation={"images": 50, "fid": 2.0})
    assert combined(old, alone, False) == (old, {"generation": 90})
    assert combined(old, alone, True)[0] == old | {"generation": alone["generation"]}
    more = data | dict(images=200, command="c", reconstruction={"mse": 0.5})
    content, kept = combined(old, more, False)
    assert not kept and content["images"] == 200 and content["generation"] == old["generation"]
    assert "pca" not in content and content["kodak"] == {"pictures": 24}
    elsewhere = more | dict(dataset="e", images=99)
    assert combined(old, elsewhere, False)[0] == old and combined(old, elsewhere, True)[0]["dataset"] == "e"
    assert combined({}, more, False) == (more, {})


def test_the_folder_that_one_stands_in_is_called_by_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    runs("evaluate", ".", *SMALL, "--max_images", 20)
    command = json.loads((folder / "metrics.json").read_text())["command"]
    assert command.startswith("hf-ae evaluate mine --dataset_name")
    assert (folder / "README.md").read_text().count("hf-ae evaluate mine ") == 1


def test_compare_has_no_floor_where_there_is_no_training_split(folder, tmp_path, capsys):
    """A dataset of one split was compared with itself, as "real (training split)"."""
    import datasets

    rows = datasets.load_dataset(str(SAMPLE), split="test").select(range(40))
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    make("vae-mlp").save_pretrained(tmp_path / "vae")
    hf_ae.AutoencoderImageProcessor().save_pretrained(tmp_path / "vae")
    words = ["compare", tmp_path / "vae", folder, "--dataset_name", tmp_path / "data"]
    runs(*words)
    printed = capsys.readouterr().out
    assert "| vae |" in printed and "training split" not in printed and "FID" in printed
    runs(*words, "--sampler", "gaussian")
    assert "no split 'train' to fit a sampler on" in capsys.readouterr().out


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_shipped_figures_are_read_by_huggingface_hub_and_are_those_of_the_card(path):
    file, metrics = path / ".eval_results" / "hf_ae.yaml", json.loads((path / "metrics.json").read_text())
    index = {r.metric_type: r.metric_value for r in ModelCard.load(path / "README.md").data.eval_results}
    on_the_hub = "/" in metrics["dataset"] and not metrics["dataset"].startswith(("outputs/", "./"))
    assert file.is_file() == on_the_hub
    if on_the_hub:
        content = yaml.safe_load(file.read_text())
        entries = parse_eval_result_entries(content)
        assert eval_result_entries_to_yaml(entries) == content
        assert {entry.dataset_id for entry in entries} == {metrics["dataset"]}
        assert {e.task_id.removeprefix("image-reconstruction-").replace("-", "_"): e.value for e in entries} == index


def test_figures_of_a_local_dataset_have_no_entry_and_broken_files_are_refused(folder):
    metrics = {"dataset": "me/data", "split": "test", "images": 9, "reconstruction": {"mse": 0.5, "psnr": 3.0}}
    write_eval_results(folder, metrics)
    check_eval_results(folder)
    assert (folder / ".eval_results" / "hf_ae.yaml").is_file()
    write_eval_results(folder, metrics | {"dataset": str(SAMPLE)})
    assert not (folder / ".eval_results").exists()
    (folder / ".eval_results").mkdir()
    for wrong in ("a: [", "- value: 3", "value: 3", "- dataset: {id: me/data}\n  value: 3"):
        (folder / ".eval_results" / "theirs.yaml").write_text(wrong)
        with pytest.raises(ValueError, match=r"theirs\.yaml"):
            check_eval_results(folder)


def test_base_models_of_the_hub_are_named_and_local_ones_are_not(folder):
    for source, expected in (("me/base", ["me/base"]), ("outputs/base", None), (str(folder), None)):
        (folder / "recipe.yaml").write_text(f"dataset_name: me/data\npretrained_model: {source}\n")
        (folder / "README.md").unlink(missing_ok=True)
        write_card(folder)
        data = ModelCard.load(folder / "README.md").data
        assert data.base_model == expected and data.datasets == ["me/data"] and data.library_name == "transformers"


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_writes_nothing_and_says_what_it_would_upload(folder, capsys):
    write_card(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    before = snapshot(folder)
    runs("push", folder, "--repo", "me/x", "--dry-run")
    assert snapshot(folder) == before
    printed = capsys.readouterr().out
    assert "modeling_autoencoder.py" in printed and "Checked, nothing uploaded" in printed
    (folder / "secret.env").write_text("x")
    fails(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], f"{folder} holds files", "secret.env")


def test_push_refuses_foreign_models_pickles_and_libraries_in_one_line(folder, tmp_path, capsys):
    from tiny_pipelines import save_pizza

    write_card(folder)
    check_folder(folder)
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    fails(capsys, ["push", other, "--repo", "me/x", "--dry-run"], "holds a 'bert' model", "hf upload")
    torch.save(load_model(folder)[0].state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    fails(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], "pytorch_model.bin", "do not belong")
    pizza = save_pizza(tmp_path / "pizza")
    index = json.loads((pizza / "model_index.json").read_text())
    wrong = [(["antigravity", "fly"], "'antigravity'"), (["transformers", "pipeline"], "no class that loads")]
    for entry, words in wrong:
        (pizza / "model_index.json").write_text(json.dumps(index | {"scheduler": entry}))
        fails(capsys, ["push", pizza, "--repo", "me/x", "--dry-run"], words)
    shutil.rmtree(pizza)


def test_an_ending_that_pillow_only_reads_is_refused_before_the_work(tmp_path, capsys):
    for command in (["decompress", "no.hfae"], ["roundtrip", "no.png", "--model", "me/none"]):
        fails(capsys, [*command, "-o", tmp_path / "x.psd"], "Pillow reads PSD images and writes none", "x.png")


# What must not be lost


def write(card, text, encoding="utf-8"):
    card.write_bytes(text.encode(encoding))
    return card.read_bytes()


@pytest.mark.parametrize(
    ("text", "encoding", "words"),
    [
        (f"# Mine\n\nHello.\n\n{BEGIN}\n\nold\n", "utf-8", "lost one of the marks"),
        (f"# Mine\n\nHello.\n\nold\n\n{END}\n", "utf-8", "lost one of the marks"),
        (f"{END}\n{BEGIN}\n", "utf-8", "lost one of the marks"),
        ("---\nlicense: [mit\nlanguage: de\n---\n# Mine\n", "utf-8", "no valid YAML"),
        ("---\n- mit\n---\n# Mine\n", "utf-8", "must hold fields"),
        ("---\nmodel-index:\n- name: x\n---\n# Mine\n", "utf-8", "model-index"),
        ("# Für Bäume\n", "latin-1", "UTF-8"),
    ],
)
def test_a_card_that_cannot_be_kept_is_refused_before_any_work(folder, text, encoding, words, capsys, monkeypatch):
    before = write(folder / "README.md", text, encoding)
    monkeypatch.setattr("hf_ae.evaluation.evaluate.load_model", None)  # not even the model is read
    fails(capsys, ["evaluate", folder, *SMALL], words)
    monkeypatch.undo()
    words_of_training = ["--output_dir", str(folder), "--overwrite_output_dir", "--max_train_steps", "1"]
    fails(capsys, ["--dataset_name", str(SAMPLE), *words_of_training], words, main=train.main)
    assert (folder / "README.md").read_bytes() == before


def test_our_sentence_in_a_persons_card_does_not_make_it_ours(folder):
    card, text = folder / "README.md", f"# My model\n\n{MADE_WITH}\nI trained it on my own photos for 3 weeks."
    write(card, text)
    write_card(folder)
    assert f"---\n\n{text}\n\n{BEGIN}" in card.read_text()


def test_fields_of_a_person_stay(folder):
    card = folder / "README.md"
    index = "model-index:\n- name: mine\n  results:\n  - task: {type: t}\n    dataset: {type: d/e, name: d}\n"
    index += "    metrics: [{type: acc, value: 0.5}, {type: mse, value: 9.0}]\n"
    write(card, f"\ufeff---\nlicense: mit\ntags: mine\ndatasets: me/photos\n{index}---\n\n# Mine\n")
    for _ in range(2):
        runs("evaluate", folder, *SMALL, "--max_images", 20)
        data = ModelCard.load(card).data
        assert (data.license, data.datasets) == ("mit", ["me/photos"]) and {"mine", "hf_ae"} <= set(data.tags)
        results = [(result.metric_type, result.metric_value) for result in data.eval_results]
        assert ("acc", 0.5) in results and ("mse", 9.0) not in results and len(results) == 5
    assert "\ufeff" not in card.read_text() and card.read_text().count("license") == 1


def test_what_was_kept_is_named_and_not_said_to_be_written(folder, tmp_path, capsys):
    shutil.copytree(SAMPLE, tmp_path / "copy")
    runs("evaluate", folder, *SMALL, "--max_images", 40)
    assert f"Written to {folder}" in capsys.readouterr().out
    other = ["--dataset_name", tmp_path / "copy", "--tasks", "reconstruction", "--train_split", "none"]
    for words in (SMALL, other):
        runs("evaluate", folder, *words, "--max_images", 1)
        printed = capsys.readouterr().out
        assert "more images (reconstruction of 40 images): write --replace" in printed and "Written" not in printed


def test_a_local_dataset_is_local_from_wherever_one_looks(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    shutil.copytree(SAMPLE, tmp_path / "me" / "data")
    words = ["--dataset_name", "me/data", "--output_dir", "trained", "--max_train_steps", "1"]
    words += ["--validation_epochs", "0", "--max_train_samples", "64", "--config_overrides", "hidden_sizes=[8]"]
    train.main(words)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_card(tmp_path / "trained")
    card = ModelCard.load(tmp_path / "trained" / "README.md")
    assert card.data.datasets is None and "dataset_name: ./me/data" in card.text
    monkeypatch.chdir(tmp_path)
    runs("evaluate", "trained", "--dataset_name", "me/data", "--max_images", 20, "--tasks", "reconstruction")
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_card(tmp_path / "trained")
    assert not (tmp_path / "trained" / ".eval_results").exists()
    results = ModelCard.load(tmp_path / "trained" / "README.md").data.eval_results
    assert {(result.dataset_type, result.dataset_name) for result in results} == {("imagefolder", "data")}
