"""A local stand-in for the Hugging Face Hub that speaks its HTTP protocol to unmodified clients.

```
with HubServer() as server:
    subprocess.run([...], env=server.client_env(home, token=OWNER))     # HF_ENDPOINT points here
    server.commits("me/vae"), server.files("me/vae"), server.requests   # what arrived
```

Models, datasets and Spaces, in memory. As on the Hub, a new repo starts with one commit that adds `.gitattributes`,
binary files travel as LFS, a private repo does not exist for others, and the `X-Error-Code` header decides which
exception a client raises. Left out: Xet, branches other than main, tags, pull requests.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

OWNER, OWNER_READ_ONLY, OTHER, WRONG = "hf_owner", "hf_owner_read_only", "hf_other", "hf_wrong"
TOKENS = {OWNER: ("me", "write"), OWNER_READ_ONLY: ("me", "read"), OTHER: ("you", "write"), "": (None, "")}
"""token -> (user, role); no token is anonymous, WRONG is nobody's."""
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".npz", ".zip")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def git_hash(data: bytes, kind: str = "blob") -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


class File:
    """One content and its names: `oid` is git's; `etag` is what clients compare by (LFS: sha256, else the oid)."""

    def __init__(self, data: bytes, lfs: bool = False):
        self.data, sha256 = data, hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        self.oid = git_hash(pointer if lfs else data)
        self.etag = sha256 if lfs else self.oid
        about_lfs = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": len(pointer)}
        self.info = {"size": len(data), "oid": self.oid, "blobId": self.oid, **({"lfs": about_lfs} if lfs else {})}


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, File]


def refused(status: int, message: str, code: str = "", **headers: str) -> HTTPException:
    return HTTPException(status, message, {"X-Error-Message": message, "X-Error-Code": code, **headers})


class HubServer:
    """On a free port of 127.0.0.1; a restart keeps the repos, not the port. `requests` lists each "METHOD /path"."""

    def __init__(self):
        self.url, self.requests = "", []
        self._repos: dict[str, list[Commit]] = {}  # "models/me/vae" -> its commits, oldest first
        self._private: set[str] = set()
        self._lfs: dict[str, bytes] = {}  # sha256 -> content
        api, plain = (
            "/api/{kind}/{owner}/{name}",
            ("/datasets/{owner}/{name}", "/spaces/{owner}/{name}", "/{owner}/{name}"),
        )
        routes = [
            Route("/api/whoami-v2", self._whoami),
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/validate-yaml", self._validate_yaml, methods=["POST"]),
            Route("/lfs/{oid}", self._store_lfs, methods=["PUT"]),
            *(Route(api + end, self._info) for end in ("", "/revision/{rev:path}")),
            *(Route(api + end, self._tree) for end in ("/tree/{rev}", "/tree/{rev}/{path:path}")),
            Route(api + "/refs", self._refs),
            Route(api + "/preupload/{rev:path}", self._preupload, methods=["POST"]),
            Route(api + "/commit/{rev:path}", self._commit, methods=["POST"]),
            *(Route(p + ".git/info/lfs/objects/batch", self._lfs_batch, methods=["POST"]) for p in plain),
            *(Route(p + "/resolve/{rev}/{path:path}", self._resolve) for p in plain),
        ]
        self._app = Starlette(routes=routes)

    def start(self):
        # Named as TCP, else asyncio leaves Nagle's algorithm on, and each answer with a body waits 40 ms.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        self.url = "http://{}:{}".format(*listener.getsockname())
        config = uvicorn.Config(self._record, interface="asgi3", lifespan="off", log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        return self

    def stop(self, *_):
        self._server.should_exit = True
        self._thread.join()

    __enter__, __exit__ = start, stop

    def client_env(self, home, token: str | None = None, **more: str) -> dict[str, str]:
        """Environment of a client process that talks to this server and keeps its cache and settings in `home`."""
        foreign = re.compile(r"(HF|HUGGING_FACE|TRANSFORMERS)_.*|.*_proxy", re.IGNORECASE)
        env = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        env |= {"HF_TOKEN": token} if token else {}
        return env | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | more

    def add(self, repo_id: str, folder: Path):
        """A public model repo with the files of a folder, as if they had been pushed."""
        repo, paths = f"models/{repo_id}", [path for path in folder.rglob("*") if path.is_file()]
        names = {path.relative_to(folder).as_posix(): path for path in paths}
        files = {name: File(path.read_bytes(), name.endswith(LFS_SUFFIXES)) for name, path in names.items()}
        self._repos[repo] = []
        self._append(repo, "initial commit", {".gitattributes": File(GIT_ATTRIBUTES), **files})

    def commits(self, repo_id: str, repo_type: str = "model") -> list[Commit]:
        """Oldest first; the first one is the repo's creation. Empty where there is no such repo."""
        return list(self._repos.get(f"{repo_type}s/{repo_id}", []))

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """path -> content, at the newest commit."""
        return {path: file.data for path, file in self.commits(repo_id, repo_type)[-1].files.items()}

    async def _record(self, scope, receive, send):
        self.requests.append(f"{scope['method']} {scope['path']}")
        await self._app(scope, receive, send)

    def _user(self, request: Request, anonymous: bool = True) -> tuple[str | None, str]:
        """(name, role) of who asks. Refuses an unknown token, and a missing one unless `anonymous` may ask."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in TOKENS:
            raise refused(401, "Invalid credentials in Authorization header")
        if not (token or anonymous):
            raise refused(401, "Invalid username or password.")
        return TOKENS[token]

    def _check_write(self, request: Request, owner: str):
        if self._user(request, anonymous=False) != (owner, "write"):
            raise refused(403, f"This token has no right to write under the namespace {owner!r}")

    def _find(self, request: Request, write: bool = False) -> tuple[str, Commit]:
        """The repo (its key) and the commit that a URL names."""
        at, (user, _) = request.path_params, self._user(request)
        first = request.url.path.split("/")[1]
        kind = at.get("kind") or (first if first in ("datasets", "spaces") else "models")
        repo, rev = f"{kind}/{at['owner']}/{at['name']}", at.get("rev", "main")
        if repo not in self._repos or (repo in self._private and user != at["owner"]):
            raise refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._check_write(request, at["owner"])
        commits = {commit.oid: commit for commit in self._repos[repo]} | {"main": self._repos[repo][-1]}
        if rev not in commits:
            raise refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return repo, commits[rev]

    async def _whoami(self, request):
        user, role = self._user(request, anonymous=False)
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return JSONResponse({"type": "user", "name": user, "orgs": [], "auth": auth})

    async def _create(self, request):
        body, (user, _) = await request.json(), self._user(request, anonymous=False)
        owner = body["organization"] or user
        self._check_write(request, owner)
        if body.get("type") == "space" and not body.get("sdk"):
            raise refused(400, "A Space needs an sdk")
        repo = f"{body.get('type', 'model')}s/{owner}/{body['name']}"
        answer = {"url": f"{self.url}/{repo.removeprefix('models/')}"}
        if repo in self._repos:
            return JSONResponse({"error": "You already created this repo", **answer}, 409)
        self._repos[repo] = []
        self._private |= {repo} if body.get("visibility") == "private" else set()
        self._append(repo, "initial commit", {".gitattributes": File(GIT_ATTRIBUTES)})
        return JSONResponse(answer)

    def _append(self, repo: str, message: str, files: dict[str, File]) -> str:
        """Add a commit of exactly `files`. Its id depends on them and, as in git, on all commits before."""
        parent = self._repos[repo][-1].oid if self._repos[repo] else repo
        content = json.dumps([parent, message, sorted((path, file.oid) for path, file in files.items())])
        self._repos[repo].append(Commit(git_hash(content.encode(), "commit"), message, files))
        return self._repos[repo][-1].oid

    async def _info(self, request):
        repo, commit = self._find(request)
        siblings = [{"rfilename": path, **file.info} for path, file in commit.files.items()]
        about = {"id": repo.split("/", 1)[1], "sha": commit.oid, "private": repo in self._private}
        return JSONResponse({**about, "siblings": siblings})

    async def _refs(self, request):
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self._find(request)[1].oid}
        return JSONResponse({"branches": [main], "tags": [], "converts": []})

    async def _tree(self, request):
        (_, commit), top = self._find(request), PurePosixPath(request.path_params.get("path", ""))
        inside = {path: file for path, file in commit.files.items() if top in PurePosixPath(path).parents}
        if not inside:
            raise refused(404, f"{top} does not exist", "EntryNotFound")
        folders = {folder for path in inside for folder in PurePosixPath(path).parents if top in folder.parents}
        entries = [{"type": "directory", "path": str(f), "oid": git_hash(bytes(f), "tree")} for f in folders]
        entries += [{"type": "file", "path": path, **file.info} for path, file in inside.items()]
        recursive = request.query_params.get("recursive") == "true"
        return JSONResponse([e for e in entries if recursive or PurePosixPath(e["path"]).parent == top])

    async def _resolve(self, request):
        (_, commit), path = self._find(request), request.path_params["path"]
        if path not in commit.files:
            raise refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        data, size = commit.files[path].data, len(commit.files[path].data)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{commit.files[path].etag}"', "Accept-Ranges": "bytes"}
        if not (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))):
            return Response(data, 200, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
        if start >= size:
            raise refused(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        return Response(data[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    async def _validate_yaml(self, request):
        header = re.match(r"---\s*\n(.*?)\n---", (await request.json())["content"], re.DOTALL)
        try:
            yaml.safe_load(header[1] if header else "")
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request):
        """How each file travels. LFS contents come next, then one commit that names all files."""
        there, answers = self._find(request, write=True)[1].files, []
        for file in (await request.json())["files"]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if binary or path.endswith(LFS_SUFFIXES) or file["size"] > 10_000_000 else "regular"
            oid = {"oid": there[path].etag} if path in there else {}  # without it clients commit unchanged files again
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return JSONResponse({"files": answers})

    async def _lfs_batch(self, request):
        self._find(request, write=True)
        objects = (await request.json())["objects"]
        for each in objects:
            if each["oid"] not in self._lfs:  # else nothing to send
                each["actions"] = {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _store_lfs(self, request):
        data, oid = await request.body(), request.path_params["oid"]
        if hashlib.sha256(data).hexdigest() != oid:
            raise refused(400, "The content has not the announced sha256")
        self._lfs[oid] = data
        return Response()

    async def _commit(self, request):
        repo, head = self._find(request, write=True)
        header, *changes = (json.loads(line) for line in (await request.body()).splitlines())
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for key, value in ((change["key"], change["value"]) for change in changes):
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = File(self._lfs[value["oid"]], lfs=True)
            else:  # deletedFile or deletedFolder
                gone = [path for path in files if f"{path}/".startswith(value["path"].rstrip("/") + "/")]
                files = {path: file for path, file in files.items() if path not in gone}
                if not gone:
                    raise refused(404, "A file with this name doesn't exist", "EntryNotFound")
        oid = self._append(repo, header["value"]["summary"], files)
        return JSONResponse({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"})
