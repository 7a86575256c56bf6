"""A hub in memory: the endpoints of Hugging Face's that `huggingface_hub` calls to push a folder and to fetch it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

REPOSITORY = r"(?:(?P<kind>models|datasets)/)?(?P<name>[\w.-]+/[\w.-]+?)"


@dataclass
class Repository:
    """Files by name, and the name of their last commit."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Subclass it for a hub of its own: `repositories` by kind and name, `objects` (large files) by SHA-256."""

    repositories: ClassVar[dict[str, Repository]]
    objects: ClassVar[dict[str, bytes]]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Make a repository, say how files are to be sent, take them, and commit."""
        path, sent = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_ann":
            self.answer({"error": "log in first"}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(sent)
            kind, name = asked.get("type", "model"), f"{asked.get('organization') or 'ann'}/{asked['name']}"
            is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
            made = self.repositories.setdefault(f"{kind}s/{name}", Repository(is_private))
            self.answer({"url": f"{self.address}/{'' if kind == 'model' else 'datasets/'}{name}", "id": made.commit})
        elif re.fullmatch(rf"/api/{REPOSITORY}/preupload/main", path):
            modes = {True: "lfs", False: "regular"}
            files = json.loads(sent)["files"]
            listed = [
                {"path": f["path"], "uploadMode": modes[f["size"] > 20_000], "shouldIgnore": False} for f in files
            ]
            self.answer({"files": listed})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(sent)["objects"]
            upload = {each["oid"]: {"href": f"{self.address}/objects/{each['oid']}"} for each in objects}
            self.answer({"objects": [each | {"actions": {"upload": upload[each["oid"]]}} for each in objects]})
        elif found := re.fullmatch(rf"/api/{REPOSITORY}/commit/main", path):
            self.commit(self.repositories[f"{found['kind']}/{found['name']}"], [*map(json.loads, sent.splitlines())])
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": path}, 404)

    def commit(self, repository: Repository, lines: list[dict[str, Any]]) -> None:
        """Change the files as a commit says, line by line."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commit = etag(repr(sorted((n, etag(f)) for n, f in repository.files.items())).encode())
        [place] = [place for place, each in self.repositories.items() if each is repository]
        url = f"{self.address}/{place.removeprefix('models/')}/commit/{repository.commit}"
        self.answer({"success": True, "commitOid": repository.commit, "commitUrl": url})

    def do_PUT(self) -> None:
        """Take a large file."""
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(sent).hexdigest() == self.path.rpartition("/")[2]
        self.objects[self.path.rpartition("/")[2]] = sent
        self.answer({})

    def do_GET(self) -> None:
        """List a repository, or give a file of it."""
        path = unquote(urlsplit(self.path).path)
        file = re.fullmatch(rf"/{REPOSITORY}/resolve/(?P<revision>\w+)/(?P<file>.*)", path)
        of = file or re.fullmatch(rf"/api/{REPOSITORY}(?P<rest>/revision/\w+|/tree/\w+)?", path)
        repository = None if of is None else self.repositories.get(f"{of['kind'] or 'models'}/{of['name']}")
        if of is None or repository is None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif file and file["file"] not in repository.files:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        elif file:
            self.send(repository.files[file["file"]], {"X-Repo-Commit": repository.commit})
        elif (of["rest"] or "").startswith("/tree/"):
            self.answer(
                [{"type": "file", "path": n, "size": len(f), "oid": etag(f)} for n, f in repository.files.items()]
            )
        else:
            siblings = [{"rfilename": name} for name in repository.files]
            self.answer(
                {"id": of["name"], "sha": repository.commit, "private": repository.private, "siblings": siblings}
            )

    def do_HEAD(self) -> None:
        """Answer as `do_GET`, without a body."""
        self.do_GET()

    @property
    def address(self) -> str:
        """Where this hub is."""
        return f"http://{self.headers['Host']}"

    def answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send JSON."""
        self.send(json.dumps(value).encode(), headers or {}, status)

    def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        """Send bytes, of which HEAD gets the length alone."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content)), "ETag": f'"{etag(content)}"'} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def etag(content: bytes) -> str:
    """Return what tells a file from another one."""
    return hashlib.sha1(content).hexdigest()
