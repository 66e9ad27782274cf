"""A stand-in for the Hub on this machine: the endpoints that huggingface_hub's client uses, files in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a list of commits; a commit is its files by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str) -> dict[str, bytes]:
        return self.repositories[repository][-1]


def commit_of(repository: str, number: int) -> str:
    return hashlib.sha1(f"{repository} {number}".encode()).hexdigest()


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def _get(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, action, revision = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "", parts[-1]
            found = self._commit(repository, "main" if not action else revision)
            if found is None:
                return
            number, files = found
            if action == "tree":
                self._json([_entry(name, content) for name, content in files.items()])
            else:
                siblings = [{"rfilename": name} for name in files]
                self._json({"id": repository, "sha": commit_of(repository, number), "siblings": siblings, "tags": []})
            return
        repository, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        found = self._commit(repository, revision)
        if found is None:
            return
        number, files = found
        if name not in files:
            self._error(404, "EntryNotFound")
            return
        headers = {"ETag": f'"{blob(files[name])}"', "X-Repo-Commit": commit_of(repository, number)}
        self._send(200, files[name], headers, body=body)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"POST {path}")
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        if path == "/api/repos/create":
            wanted = json.loads(content)
            repository = f"{wanted.get('organization') or 'anyone'}/{wanted['name']}"
            if repository in self.server.repositories:
                self._send(409, json.dumps({"url": f"{self.server.address}/{repository}"}).encode(), {})
                return
            self.server.repositories[repository] = [{}]
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.server.private.add(repository)
            self._json({"url": f"{self.server.address}/{repository}"})
            return
        repository, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
        found = self._commit(repository, revision)
        if found is None:
            return
        number, files = found
        if action == "paths-info":
            wanted = parse_qs(content.decode())["paths"]
            self._json([_entry(name, files[name]) for name in wanted if name in files])
        elif action == "preupload":
            asked = json.loads(content)["files"]
            self._json(
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]}
            )
        elif action == "commit":
            after = dict(files)
            parent = json.loads(content.splitlines()[0])["value"].get("parentCommit")
            if parent not in (None, commit_of(repository, number)):
                self._send(412, b"{}", {"X-Error-Message": "a commit has happened since"})
                return
            for line in content.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    after[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            self.server.repositories[repository].append(after)
            oid = commit_of(repository, number + 1)
            self._json({"commitUrl": f"{self.server.address}/{repository}/commit/{oid}", "commitOid": oid})
        else:
            self._send(404, b"{}", {})

    def _commit(self, repository: str, revision: str) -> tuple[int, dict[str, bytes]] | None:
        commits = self.server.repositories.get(repository)
        if commits is None:
            self._error(404, "RepoNotFound")
        elif repository in self.server.gated:
            self._error(403, "GatedRepo")
        else:
            for number, files in enumerate(commits):
                if revision == commit_of(repository, number) or (revision == "main" and number == len(commits) - 1):
                    return number, files
            self._error(404, "RevisionNotFound")
        return None

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": blob(content)}


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
