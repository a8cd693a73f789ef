"""The repository as an extension of the `hf` command line: what `hf extensions install OWNER/hf-ae` needs of it."""

import datetime
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from huggingface_hub.cli import extensions
from shipped import ROOT


def test_hf_runs_the_console_script_that_the_package_installs(tmp_path):
    """The last step of the installation, which downloads from GitHub, is done by hand; `hf` itself is the real one."""
    owner, repo, short = extensions._normalize_repo_id("owner/hf-ae")
    needed = extensions._get_executable_name(short)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (owner, repo, needed) == ("owner", "hf-ae", "hf-ae") and project["scripts"][needed] == "hf_ae_cli:main"
    script = Path(sys.executable).with_name(needed)
    manifest = extensions.ExtensionManifest(
        owner=owner, repo=repo, repo_id=f"{owner}/{repo}", short_name=short, executable_path=str(script),
        type="python", installed_at=datetime.datetime.now(datetime.UTC), description=project["description"],
    )  # fmt: skip
    manifest.save(tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-ae")
    env = {**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    hf = Path(sys.executable).with_name("hf")

    def run(*words):
        return subprocess.run([hf, *words], env=env, capture_output=True, text=True)

    assert "ae" in run("extensions", "list").stdout
    shown = run("ae", "--help")
    assert shown.returncode == 0 and "compress" in shown.stdout and "evaluate" in shown.stdout
    failed = run("ae", "decompress", tmp_path / "none.hfae", "-o", tmp_path / "x.png")
    assert failed.returncode == 2 and failed.stderr.startswith("error: The file ")
