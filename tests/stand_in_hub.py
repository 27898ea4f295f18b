"""A stand-in for the hub on loopback: serves folders as repositories, with faults on demand."""

import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse


@dataclass
class Fault:
    """What happens to the first `times` requests whose method and path match a pattern.

    kind: "status" (answer with `status` and `headers`), or a body that ends after `n_bytes`: "cut"
    (the connection breaks), "stall" (nothing more is sent) or "short" (a wrong Content-Length).
    """

    kind: str
    pattern: str = ""
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    n_bytes: int = 0


class StandInHub:
    """Serves ROOT/datasets/OWNER/NAME and ROOT/models/OWNER/NAME at `url` inside `with`.

    `requests` lists "METHOD path" of every request, `faults` the faults that are left.
    """

    def __init__(self, root: Path, *faults: Fault):
        self.root, self.faults, self.requests = root, list(faults), []
        self.lock, self.closed = threading.Lock(), threading.Event()

    def __enter__(self) -> "StandInHub":
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            found = (f for f in self.faults if f.times and re.search(f.pattern, request))
            fault = next(found, None)
            if fault:
                fault.times -= 1
            return fault


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, *args) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # of a client that has given up
            super().handle()

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlparse(self.path)
        path = unquote(url.path)
        self.fault = self.hub.take_fault(f"{self.command} {path}")
        if self.fault and self.fault.kind == "status":
            self.answer(b'{"error": "a fault"}', self.fault.status, self.fault.headers)
            return
        api = re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(\w[\w-]*)/.*?)?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if api and (self.hub.root / api[1] / api[2]).is_dir():
            repo = self.hub.root / api[1] / api[2]
            self.answer(json.dumps(self.metadata(repo, path, url.query, body)).encode())
        elif file:
            repo = self.hub.root / ("datasets" if file[1] else "models") / file[2]
            self.send_file(repo, repo / file[3])
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET

    def metadata(self, repo: Path, path: str, query: str, body: bytes) -> dict | list:
        """The JSON of the hub's API for a repository, its tree, or some of its paths."""
        tree = re.search(r"/tree/[^/]+/?(.*)", path)
        if "/paths-info/" in path:
            names = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            return [entry(repo, repo / name) for name in names if (repo / name).exists()]
        if tree:
            is_recursive = parse_qs(query.lower()).get("recursive") == ["true"]
            found = (repo / tree[1]).glob("**/*" if is_recursive else "*")
            return [entry(repo, path) for path in sorted(found)]
        files = [entry(repo, path) for path in sorted(repo.rglob("*")) if path.is_file()]
        return {
            "id": "/".join(repo.parts[-2:]),
            "sha": commit(repo),
            "siblings": [{"rfilename": file["path"]} for file in files],
            "tags": [],
        }

    def send_file(self, repo: Path, file: Path) -> None:
        if not file.is_file():
            code = "EntryNotFound" if repo.is_dir() else "RepoNotFound"
            self.answer(b"{}", 404, {"X-Error-Code": code})
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit(repo)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.answer(data, 200, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(data[first : last + 1], 206, headers)

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        fault = self.fault if self.fault and self.fault.kind != "status" else None
        sent = body[: fault.n_bytes] if fault else body
        is_short = fault is not None and fault.kind == "short"
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(sent if is_short else body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
            self.wfile.flush()
        if fault and fault.kind == "stall":
            self.hub.closed.wait()
        self.close_connection = fault is not None and not is_short


def entry(repo: Path, path: Path) -> dict:
    """A file or folder as the hub's API describes it."""
    is_dir = path.is_dir()
    return {
        "type": "directory" if is_dir else "file",
        "path": path.relative_to(repo).as_posix(),
        "size": 0 if is_dir else path.stat().st_size,
        "oid": hashlib.sha1(b"" if is_dir else path.read_bytes()).hexdigest(),
    }


def commit(repo: Path) -> str:
    """A hash of a repository's files in place of its commit."""
    files = sorted(path for path in repo.rglob("*") if path.is_file())
    content = b"".join(path.name.encode() + path.read_bytes() for path in files)
    return hashlib.sha1(content).hexdigest()
