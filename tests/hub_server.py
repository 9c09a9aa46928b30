"""A model hub on this machine: the part of the Hugging Face hub's protocol that models by name need, in and out."""

import base64
import json
import re
import time
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from pathlib import Path

from loopback import Loopback, QuietHandler

TOKEN = "hf_the-token-that-may-read-private-models"


@dataclass
class HubModel:
    """A model on the hub: a folder's files, as one commit.

    private, gated: only requests with `TOKEN` get it. status: every answer is this error. pause: seconds before every
    answer. cuts: of a large file so many bytes arrive, each used up by one request.
    """

    folder: Path
    private: bool = False
    gated: bool = False
    status: int | None = None
    pause: float = 0
    cuts: list[int] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}

    @property
    def commit(self) -> str:
        return sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class HubServer(Loopback):
    """Serves `models` by name while it is entered; `requests` are (method, path) in the order in which they came.

    As on the hub, weights lie on another host name (`/cdn/...`, which must not be sent a token), small files come from
    `/{name}/resolve/{revision}/{file}` itself, and an `alias` is an older name that redirects to a newer one.
    With `TOKEN`, models are `created` (their names), with `branches`, and sent to them in `commits`: (name, branch, the
    files). Unlike the hub, this one takes large files in the commit itself. full: commits are refused.
    """

    models: dict[str, HubModel] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens_to_cdn: int = 0
    created: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=lambda: ["main"])
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    full: bool = False

    def handler(self) -> type[QuietHandler]:
        hub = self

        class Handler(QuietHandler):
            def do_GET(self):
                hub.requests.append((self.command, self.path))
                path = self.path.split("?")[0]
                if path.startswith("/cdn/"):
                    return self.large_file(*path.removeprefix("/cdn/").rsplit("/", 1))
                may_read = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if path.endswith("/auth-check/write"):
                    return self.answer(200 if may_read else 403)
                match = re.fullmatch(r"/(?:api/models/)?(.+?)(?:/(resolve|revision|tree)/([^/]+)(?:/(.*))?)?", path)
                name, what, revision, file = match.groups()
                if name in hub.aliases:
                    return self.answer(307, {"Location": self.path.replace(name, hub.aliases[name], 1)})
                model = hub.models.get(name)
                if model is None or (model.private and not may_read):
                    return self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
                time.sleep(model.pause)
                if model.status:
                    return self.answer(model.status)
                if what == "resolve" and model.gated and not may_read:
                    return self.answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
                if revision not in (None, "main", model.commit):
                    return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
                if path.startswith("/api/models/"):
                    return self.about(name, model, what, file)
                return self.file(name, model, file)

            do_HEAD = do_GET

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(403 if "Authorization" in self.headers else 401)
                if self.path == "/api/validate-yaml":
                    return self.answer_json({"warnings": [], "errors": []})
                if self.path == "/api/repos/create":
                    about = json.loads(body)
                    name = f"{about.get('organization') or 'me'}/{about['name']}"
                    hub.created.append(name)
                    return self.answer_json({"url": f"{hub.url}/{name}"})
                path = self.path.split("?")[0]
                name, what, revision = re.fullmatch(r"/api/models/(.+)/(branch|preupload|commit)/(.+)", path).groups()
                if what == "branch":
                    hub.branches.append(revision)
                    return self.answer_json({})
                if revision not in hub.branches:
                    return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
                if what == "preupload":
                    files = [file["path"] for file in json.loads(body)["files"]]
                    modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                    return self.answer_json({"files": modes})
                if hub.full:
                    return self.answer(403, {"X-Error-Message": "Storage limit reached"})
                values = [entry["value"] for entry in map(json.loads, body.splitlines()) if entry["key"] == "file"]
                sent = {value["path"]: base64.b64decode(value["content"]) for value in values}
                hub.commits.append((name, revision, sent))
                self.answer_json({"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})

            def answer_json(self, about: dict) -> None:
                self.answer(200, {"Content-Type": "application/json"}, json.dumps(about).encode())

            def about(self, name: str, model: HubModel, what: str | None, folder: str | None) -> None:
                if what != "tree":
                    about = {"id": name, "sha": model.commit, "private": model.private, "tags": [], "siblings": []}
                elif folder:
                    return self.answer(404, {"X-Error-Code": "EntryNotFound"})
                else:
                    about = [
                        {"type": "file", "path": path, "size": len(content), "oid": sha1(content).hexdigest()}
                        for path, content in model.files.items()
                    ]
                self.answer_json(about)

            def file(self, name: str, model: HubModel, file: str) -> None:
                commit = {"X-Repo-Commit": model.commit}
                content = model.files.get(file)
                if content is None:
                    return self.answer(404, {"X-Error-Code": "EntryNotFound", **commit})
                if not is_large(file):
                    return self.answer(200, {"ETag": f'"{sha1(content).hexdigest()}"', **commit}, content)
                # Another name of this machine stands for the other host.
                elsewhere = f"http://localhost:{hub.http.server_port}/cdn/{name}/{file}"
                linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256(content).hexdigest()}"'}
                self.answer(302, {"Location": elsewhere, **linked, **commit})

            def large_file(self, name: str, file: str) -> None:
                hub.tokens_to_cdn += "Authorization" in self.headers
                model = hub.models[name]
                self.answer(200, {}, model.files[file][: model.cuts.pop() if model.cuts else None])

            def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        return Handler


def is_large(file: str) -> bool:
    return file.endswith((".safetensors", ".bin"))
