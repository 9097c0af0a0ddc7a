"""A Hub on 127.0.0.1, in memory: the HTTP endpoints through which huggingface_hub's client pushes and pulls models.

Written after the client (`huggingface_hub.hf_api`, `_commit_api`, `file_download`). Files are taken as "regular" ones,
whose content travels in the commit, so that no object store is needed. Faults can be switched on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"
USER = "someone"


@dataclass
class Repo:
    """A model repository: commit hash to its files, and which commit each branch is at."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files_of(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


class HubServer(ThreadingHTTPServer):
    """Context manager; `url` is the endpoint. `requests` lists what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.answering = threading.Event()
        """Cleared, every answer is withheld until it is set."""
        self.forget_faults()

    def forget_faults(self) -> None:
        self.answering.set()
        self.status: int | None = None
        """Every request is answered with this instead."""
        self.truncated = ""
        """End of the name of the file of which only half arrives, and nothing more when it is asked for the rest."""

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Puts a commit there without the client and returns its hash."""
        return self.repos.setdefault(repo_id, Repo(private)).commit(files)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    # ------------------------------------------------------------------------------------------------------ answers

    def _answer(self, status: int, body: bytes = b"", content_type: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode())

    def _error(self, status: int, code: str, message: str) -> None:
        self._answer(status, b"{}", X_Error_Code=code, X_Error_Message=message)

    # ----------------------------------------------------------------------------------------------------- requests

    def do_HEAD(self) -> None:  # noqa: N802
        self._handle()

    do_GET = do_POST = do_HEAD  # noqa: N815

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.server.answering.wait(60)
        try:
            if self.server.status is not None:
                self._error(self.server.status, "", "a fault that the test wants")
            else:
                with self.server.lock:
                    self._route(path, body)
        except (BrokenPipeError, ConnectionResetError):  # the client gave up
            self.close_connection = True

    def _route(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            self._json({"type": "user", "name": USER}) if self._has_token() else self._error(401, "", "no token")
        elif path == "/api/validate-yaml":
            self._validate_yaml(json.loads(body))
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/([^/]+))?/?", path):
            repo_id, what, revision = match.groups()
            action = getattr(self, f"_{what or 'revision'}")
            self._with_repo(repo_id, lambda repo: action(repo, repo_id, revision or "main", body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo_id, revision, file = match.groups()
            self._with_repo(repo_id, lambda repo: self._resolve(repo, revision, file))
        else:
            self._error(404, "", f"no such endpoint: {path}")

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _with_repo(self, repo_id: str, action) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not self._has_token()):
            # As the Hub: who may not see a repository does not learn whether there is one.
            status = 404 if self._has_token() else 401
            self._error(status, "RepoNotFound", "Repository not found")
        elif self.command == "POST" and not self._has_token():
            self._error(401, "", "Invalid credentials")
        else:
            action(repo)

    def _commit_of(self, repo: Repo, revision: str) -> str | None:
        sha = repo.branches.get(revision, revision)
        if sha in repo.commits:
            return sha
        self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    # ------------------------------------------------------------------------------------------------------ pushing

    def _validate_yaml(self, content: dict) -> None:
        match = re.match(r"---\n(.*?)\n---\n", content["content"], re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else {}
        errors = [] if isinstance(metadata, dict) else [{"message": "the metadata are no table"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self, content: dict) -> None:
        if not self._has_token():
            self._error(401, "", "Invalid credentials")
            return
        repo_id = f"{content.get('organization') or USER}/{content['name']}"
        exists = repo_id in self.server.repos
        if not exists:
            private = content.get("private") or content.get("visibility") == "private"
            self.server.repos[repo_id] = Repo(bool(private))
            self.server.repos[repo_id].commit({".gitattributes": b""})
        self._json({"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}, 409 if exists else 200)

    def _preupload(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})

    def _commit(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> None:
        files = dict(repo.files_of(revision))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] != "header":
                raise ValueError(f"This server does not know the operation {line['key']!r}.")
        sha = repo.commit(files, revision)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}"})

    # ------------------------------------------------------------------------------------------------------ pulling

    def _revision(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> None:
        if sha := self._commit_of(repo, revision):
            siblings = [{"rfilename": name} for name in repo.commits[sha]]
            self._json({"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "siblings": siblings})

    def _tree(self, repo: Repo, repo_id: str, revision: str, body: bytes) -> None:
        if sha := self._commit_of(repo, revision):
            files = repo.commits[sha].items()
            self._json([{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files])

    def _resolve(self, repo: Repo, revision: str, file: str) -> None:
        sha = self._commit_of(repo, revision)
        if sha is None:
            return
        content = repo.commits[sha].get(file)
        if content is None:
            self._answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        elif self.command == "GET" and self.server.truncated and file.endswith(self.server.truncated):
            self._send_half(content)
        else:
            headers = {"ETag": f'"{_etag(content)}"', "X_Repo_Commit": sha, "Accept_Ranges": "none"}
            self._answer(200, content, "application/octet-stream", **headers)

    def _send_half(self, content: bytes) -> None:
        self.close_connection = True
        if "Range" not in self.headers:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])


def _etag(content: bytes) -> str:
    """Hash of a file in git, by which the client names it in its cache."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
