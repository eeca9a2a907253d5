"""A hub on the loopback address that speaks the part of the protocol by which huggingface_hub uploads a model."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from tests.python_model.xet import Xet

TOKEN = "hf_" + "a" * 34
OWNER = "me"
LARGE = (".safetensors", ".bin", ".model")
"""Suffixes of files that a repository of the hub keeps as large ones, by its ``.gitattributes``."""


class Hub:
    """Repositories, and what was asked of them.

    Attributes:
        url: of the server.
        private: whether each repository is.
        files: of each repository, by path; only what a commit names.
        requests: method and path of each request, in order.
        fails: called with method and path; an HTTP status to answer with, or None.
    """

    def __init__(self) -> None:
        self.url = ""
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.fails: Callable[[str], int | None] = lambda request: None
        self._storage = Xet(self.blobs)

    def answer(self, request: str, body: bytes, headers: Any) -> tuple[int, dict[str, Any]]:
        """The status and the JSON of a reply."""
        self.requests.append(request)
        if (status := self.fails(request)) is not None:
            return status, {
                "error": "You are not allowed to" if status == 403 else "Internal Error - We're working on it"
            }
        if (found := re.fullmatch(r"PUT /upload/(\w+)", request)) is not None:  # an address that is signed by itself
            if hashlib.sha256(body).hexdigest() != found[1]:
                return 400, {"error": "the content has another SHA-256"}
            self.blobs[found[1]] = body
            return 200, {}
        if re.match(r"\w+ /v\d/", request):
            return self._storage.answer(request, body, headers)
        if headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if request == "POST /api/validate-yaml":
            return self._card(json.loads(body)["content"])
        if request == "POST /api/repos/create":
            return self._create(json.loads(body))
        found = re.fullmatch(r"GET /api/models/(\w+/[\w-]+)/(xet-write-token|revision)/main", request)
        if found is not None and found[1] in self.files:
            head = {"id": found[1], "sha": f"{len(self.commits):040x}"}
            return 200, self._storage.access(self.url) if found[2] == "xet-write-token" else head
        found = re.fullmatch(
            r"POST (?:/api/models)?/(\w+/[\w-]+)(?:/(preupload|commit)/main|\.git/info/lfs/(.*))", request
        )
        if found is None:
            return 404, {"error": f"{request}: nothing is known of it"}
        name, step, large = found.groups()
        if name not in self.files:
            return 404, {"error": "Repository not found"}
        if step == "commit":
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        given = json.loads(body)
        if step == "preupload":
            return 200, {"files": [self._mode(name, file) for file in given["files"]]}
        if large == "verify":
            return (200, {}) if len(self.blobs[given["oid"]]) == given["size"] else (404, {"error": "no such object"})
        assert given["operation"] == "upload" and given["hash_algo"] == "sha256" and "basic" in given["transfers"]
        return 200, {"transfer": "basic", "objects": [self._action(name, item) for item in given["objects"]]}

    def _card(self, content: str) -> tuple[int, dict[str, Any]]:
        """As the hub, whose metadata has to be YAML with known kinds of values."""
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(head[1]) if head else None
        if not isinstance(data, dict):
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        wrong = [name for name in ("tags", "datasets") if not isinstance(data.get(name, []), list)]
        wrong += [name for name in ("license", "pipeline_tag") if not isinstance(data.get(name, ""), str)]
        errors = [{"message": f'"{name}" has a wrong type'} for name in wrong]
        return (400 if errors else 200), {"errors": errors, "warnings": []}

    def _create(self, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{given['organization']}/{given['name']}"
        if given["organization"] != OWNER:
            return 403, {
                "error": f'You don\'t have the rights to create a model under the namespace "{given["organization"]}"'
            }
        found = {"name": name, "url": f"{self.url}/{name}"}
        if name in self.files:
            return 409, {"error": "You already created this model repo", **found}
        self.private[name] = given.get("visibility") == "private" or given.get("private") is True
        self.files[name] = {}
        return 200, found

    def _mode(self, name: str, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(LARGE) or b"\0" in base64.b64decode(file["sample"])
        known = self.files[name].get(file["path"])
        oid = None
        if known is not None:
            head = b"blob %d\0" % len(known)
            oid = hashlib.sha256(known).hexdigest() if large else hashlib.sha1(head + known).hexdigest()
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _action(self, name: str, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.blobs:
            return item
        actions = {
            "upload": {"href": f"{self.url}/upload/{item['oid']}"},
            "verify": {"href": f"{self.url}/{name}.git/info/lfs/verify"},
        }
        return {**item, "actions": actions}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        head, *operations = lines
        assert head["key"] == "header"
        files = dict(self.files[name])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.blobs:
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                return 400, {"error": f"{value['path']}: no such object was uploaded"}
        self.files[name] = files
        self.commits.append(head["value"]["summary"])
        oid = f"{len(self.commits):040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub that runs while the block does."""
    kept = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self._body()
            status, reply = kept.answer(f"{self.command} {self.path}", body, self.headers)
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if "error" in reply:
                self.send_header("X-Error-Message", reply["error"])
            self.end_headers()
            self.wfile.write(content)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
