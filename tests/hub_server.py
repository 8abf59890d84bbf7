"""A Hugging Face Hub on this machine: as much of its API as pushing and pulling a model takes, kept in memory.

Repositories are created, looked up, committed to (with the preupload question and LFS for weights), branched, listed
and read by commit, tag or branch. Written from what huggingface_hub 1 and 2 ask and expect.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_thisIsTheSecretOfTheTests"
LARGE = (".safetensors", ".parquet")


@dataclass
class Repository:
    """Commits and what points to them: `commits` sha → {path: bytes}, `refs` branch or tag → sha."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Add a commit; returns its sha."""
        sha = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        """The sha of a branch, a tag or a commit."""
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Hub:
    """What the server holds: repositories by USER/NAME, large files by sha256, and all requests so far."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def repository(self, name: str, **what: Any) -> Repository:
        """A new one, with an empty first commit."""
        made = self.repositories[name] = Repository(**what)
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return made


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "") -> None:
        self.answer({"error": code or "refused"}, status, **({"X_Error_Code": code} if code else {}))

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def found(self, name: str) -> Repository | None:
        """The repository, or None if the answer was given already."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.known):
            self.refuse(404 if self.known else 401, "RepoNotFound")
            return None
        return repository

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.asked.append((self.command, self.path))
        if parts[:2] == ["api", "models"]:
            repository = self.found("/".join(parts[2:4]))
            if repository is None:
                return
            sha = repository.resolve(parts[5] if len(parts) > 5 else "main")
            if sha is None:
                return self.refuse(404, "RevisionNotFound")
            files = repository.commits[sha]
            if parts[4:5] == ["tree"]:
                return self.answer([self._entry(path, files[path]) for path in sorted(files)])
            name = "/".join(parts[2:4])
            siblings = [{"rfilename": path} for path in sorted(files)]
            about = {"id": name, "sha": sha, "siblings": siblings, "private": repository.private, "tags": []}
            return self.answer(about)
        if parts[2:3] == ["resolve"]:
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.refuse(404)

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return entry

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self.found(name)
        if repository is None:
            return None
        if repository.gated:
            return self.refuse(403, "GatedRepo")
        sha = repository.resolve(revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        content = repository.commits[sha].get(path)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        etag = hashlib.sha256 if path.endswith(LARGE) else hashlib.sha1
        headers = {"ETag": f'"{etag(content).hexdigest()}"', "X_Repo_Commit": sha}
        return self.answer(content, **headers)

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.asked.append((self.command, self.path))
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        self.hub.asked.append((self.command, self.path))
        if not self.known:
            return self.refuse(401)
        path = urlsplit(self.path).path
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
            return self.answer({"transfer": "basic", "objects": objects})
        repository = self.found("/".join(parts[2:4]))
        if repository is None:
            return None
        what, branch = parts[4:6]
        if what == "branch":
            if branch in repository.refs:
                return self.refuse(409)
            repository.refs[branch] = repository.refs["main"]
            return self.answer({})
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
            return self.answer({"files": modes})
        assert what == "commit", path
        return self._commit("/".join(parts[2:4]), repository, branch, body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "somebody-else":
            return self.refuse(403)
        if name in self.hub.repositories:
            return self.answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repository(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.answer({"url": f"{self.hub.url}/{name}"})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        files, message = dict(repository.commits[repository.refs[branch]]), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                assert operation["key"] == "deletedFile", operation
                del files[value["path"]]
        sha = repository.commit(files, branch, message)
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers at its `url` while the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
