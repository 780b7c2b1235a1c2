"""A server on loopback with as much of the Hugging Face hub as uploading and downloading a repository takes.

Files are kept in memory. Large ones go through Git LFS, as the hub has it: a batch request, then a PUT for each.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

COMMIT = "0" * 40


class LoopbackHub(http.server.ThreadingHTTPServer):
    """`repositories` has the files of each; `requests` what was asked for, as method and path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []


@contextlib.contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        self._file()

    def do_PUT(self) -> None:
        self._noted()
        content = self._body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self._answer({})

    def do_POST(self) -> None:
        self._noted()
        body = self._body()
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            self.server.repositories.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            objects = [o | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in wanted]
            self._answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path.partition("?")[0]):
            modes = [{"path": f["path"], "size": f["size"]} for f in json.loads(body)["files"]]
            for file in modes:
                file |= {"uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
            self._answer({"files": modes})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path.partition("?")[0]):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": self.path}, HTTPStatus.NOT_FOUND)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _file(self) -> None:
        self._noted()
        match = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[\w.-]+/(.+)", self.path)
        files = self.server.repositories.get(match[1]) if match else None
        if match is None or files is None or match[2] not in files:
            code = "EntryNotFound" if files is not None else "RepoNotFound"
            self._answer({"error": code}, HTTPStatus.NOT_FOUND, {"X-Error-Code": code})
            return
        content = files[match[2]]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self._answer(content, HTTPStatus.OK, headers, kind="application/octet-stream")

    def _noted(self) -> None:
        self.server.requests.append((self.command, self.path))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while length := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(
        self,
        content: Any,
        status: HTTPStatus = HTTPStatus.OK,
        headers: dict[str, str] | None = None,
        kind: str = "application/json",
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass
