"""A Hub that does not answer as it should: no sampler is taken for missing, and a push says what has happened."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from processes import run_python

import hf_ae
from hf_ae.hub.cards import write_card

ASK = """
import json, sys
from hf_ae.errors import UserError
from hf_ae.latents.sampling import FILE, file_beside
try:
    print(json.dumps(file_beside("me/model", FILE)))
except UserError as error:
    print(json.dumps(str(error)))
"""
PUSH = """
import sys
from hf_ae.errors import UserError
from hf_ae.hub.push import push_folder
try:
    push_folder(sys.argv[1], "me/model")
except UserError as error:
    print(error)
"""


class Broken(BaseHTTPRequestHandler):
    """Refuses everything with `status`, but may let a repository be created."""

    status, creates = 403, False

    def answer(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        good = self.creates and self.path == "/api/repos/create"
        body = json.dumps({"url": f"http://{self.headers['host']}/me/model"}).encode() if good else b"{}"
        self.send_response(200 if good else self.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Starts a broken Hub, of which the environment of child processes knows."""
    servers = []

    def start(**fields):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Broken,), fields))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_TOKEN", "hf_owner")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_hub_that_refuses_is_not_taken_for_one_without_a_sampler(hub):
    hub(status=403)
    said = json.loads(run_python(ASK).splitlines()[-1])
    assert said is not None and said.startswith("The Hub cannot be asked for the sampler.safetensors of me/model: ")


@pytest.mark.parametrize("creates, words", [(False, "Nothing was uploaded, and"), (True, "is there, but no file was")])
def test_a_push_that_fails_says_whether_a_repository_was_created(creates, words, hub, tmp_path):
    model = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(hidden_sizes=[8], latent_dim=2))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(folder)
    write_card(folder)
    hub(status=403, creates=creates)
    said = run_python(PUSH, folder).splitlines()[-1]
    assert words in said and "me/model" in said
