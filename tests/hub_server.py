"""The part of the Hugging Face Hub that the real `huggingface_hub` client needs, on 127.0.0.1, with a record of use: reading,
sending files ahead by the protocol of git LFS, and commits.

Weight files are redirected to another host name and port, as the Hub does to its CDN, by an address that is signed and expires;
what arrives there is recorded too. Small files are redirected to another address of the same host.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

SIGNED = "secretSignature"
"""What the signature of each address begins with."""


class Request(NamedTuple):
    method: str
    path: str
    status: int
    body_bytes: int  # sent, headers apart
    authorization: str | None


@dataclass
class Model:
    """A repository: commits by name of branch or tag, and the files of each commit."""

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    token: str | None = None  # without it the model is as if it did not exist
    gated: bool = False
    failing: int | None = None  # the status of all answers about it
    ranges: bool = True  # whether the CDN heeds Range
    dates: dict[str, str] = field(default_factory=dict)  # of commits that were made here


@functools.cache
def digest_of(data: bytes, algorithm: str) -> str:
    return hashlib.new(algorithm, data).hexdigest()


def commit_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class HubServer:
    """Serves `models` from `with` to the end of it; `failing` answers everything with that status."""

    models: dict[str, Model]
    failing: int | None = None
    requests: list[Request] = field(default_factory=list)
    cdn: str = ""  # where weight files are; to put a proxy before it, set it anew
    linked: bool = True  # whether the Hub tells size and digest of a file on the CDN; some mirrors don't
    never: bool = False  # whether the CDN takes no address at all
    blobs: dict[str, bytes] = field(default_factory=dict)  # files that were sent ahead, by digest
    readers: frozenset[str] = frozenset()  # tokens that may not write
    _signed: set[str] = field(default_factory=set)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        class Cdn(Handler):
            is_cdn = True

        self._servers = [_Server(("127.0.0.1", 0), handler) for handler in (Handler, Cdn)]
        self._threads = [threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02}) for one in self._servers]
        for thread in self._threads:
            thread.start()
        self.endpoint, self.cdn_itself = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        self.cdn = self.cdn_itself.replace("127.0.0.1", "localhost")
        return self

    def __exit__(self, *_: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def sign(self, path: str) -> str:
        """An address of a file that is good until it expires."""
        signature = SIGNED + secrets.token_hex(8)
        self._signed.add(signature)
        return f"{self.cdn}/cdn{path}?Expires=1&Signature={signature}"

    def takes(self, query: str) -> bool:
        """Whether the CDN answers to an address."""
        (signature,) = parse_qs(query).get("Signature", [""])
        return signature in self._signed and not self.never

    def expire(self) -> None:
        """Let all addresses that were signed so far expire."""
        self._signed.clear()

    def about(self, repo: str) -> list[Request]:
        return [request for request in self.requests if f"/{repo}/" in f"{request.path}/"]

    def fetched(self, repo: str) -> dict[str, int]:
        """Body bytes that GET requests took, by file of the model; redirects count where they lead."""
        total: dict[str, int] = {}
        for request in self.about(repo):
            if request.method == "GET" and request.status < 300 and not request.path.startswith("/api/"):
                name = re.sub(r"^(/cdn)?/[^/]+/[^/]+/resolve/[^/]+/", "", request.path)
                total[name] = total.get(name, 0) + request.body_bytes
        return total


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections that nobody has accepted yet: more are dropped


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer
    is_cdn = False

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        """A file that is sent ahead."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        hub, query = self.server_hub, urlsplit(self.path).query
        name = urlsplit(self.path).path.rpartition("/")[2]
        if not self.is_cdn or not hub.takes(query) or hashlib.sha256(data).hexdigest() != name:
            return self._send(403, b"", {})
        hub.blobs[name] = data
        return self._send(200, b"", {})

    def do_POST(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git/info/lfs/objects/batch|/(preupload|commit)/(.+))", path)
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if match is None or (model := hub.models.get(match[1])) is None:
            return self._fail(404, "RepoNotFound", "Repository not found")
        if status := hub.failing or model.failing:
            return self._send(status, b"{}", {})
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not given or given in hub.readers:
            return self._fail(403, "", "You have no rights to write")
        if match[2] is None:
            return self._send_json({"transfer": "basic", "objects": [self._place_for(one) for one in json.loads(body)["objects"]]})
        if match[3] not in model.revisions:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {match[3]}")
        if match[2] == "preupload":
            modes = {True: "lfs", False: "regular"}
            told = [
                {"path": one["path"], "uploadMode": modes[one["size"] > 1 << 20], "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._send_json({"files": told})
        return self._commit(match[1], model, match[3], [json.loads(line) for line in body.splitlines()])

    def _place_for(self, one: dict[str, Any]) -> dict[str, Any]:
        """Where to send a file; nowhere, if it is here."""
        there = one["oid"] in self.server_hub.blobs
        action = {"href": self.server_hub.sign(f"/{one['oid']}"), "header": {}}
        return {**one, "authenticated": True, **({} if there else {"actions": {"upload": action}})}

    def _commit(self, repo: str, model: Model, branch: str, lines: list[dict[str, Any]]) -> None:
        head, *changes = ((line["key"], line["value"]) for line in lines)
        before = model.revisions[branch]
        if head[1].get("parentCommit", before) != before:
            return self._send(412, b"{}", {"X-Error-Message": "A commit has happened since."})
        files = dict(model.commits[before])
        for key, value in changes:
            if key == "lfsFile" and value["oid"] not in self.server_hub.blobs:
                return self._fail(400, "", "an LFS file is not here")
            files[value["path"]] = self.server_hub.blobs[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])
        commit = commit_of(f"{repo} {branch} {before}")
        is_request = "create_pr=1" in urlsplit(self.path).query
        model.commits[commit], model.dates[commit] = (
            files,
            datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        )
        model.revisions["refs/pr/1" if is_request else branch] = commit
        url = f"{self.server_hub.endpoint}/{repo}"
        more = {"pullRequestUrl": f"{url}/discussions/1"} if is_request else {}
        return self._send_json({"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}", **more})

    def _answer(self) -> None:
        hub = self.server_hub
        path = unquote(urlsplit(self.path).path)
        cdn = self.is_cdn
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|commits)/(.+))?", path)
        file = re.fullmatch(r"(?:/cdn)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        model = hub.models.get(match[1]) if match else None
        if status := hub.failing or (model and model.failing):
            return self._send(status, b"<html>sorry</html>", {"Content-Type": "text/html"})
        given = self.headers.get("Authorization")
        if given and given.startswith("Bearer bad"):
            return self._fail(401, "", "Invalid credentials in Authorization header")
        if cdn and not hub.takes(urlsplit(self.path).query):
            return self._send(403, f"<Error>{self.path}</Error>".encode(), {"Content-Type": "application/xml"})
        if match is None or model is None or (model.token and not cdn and given != f"Bearer {model.token}"):
            return self._fail(401, "RepoNotFound", "Repository not found")
        revision = (api[3] if api else file[2] if file else None) or "main"
        commit = model.revisions.get(revision, revision)
        if commit not in model.commits:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = model.commits[commit]
        if api:
            if api[2] == "tree":
                listing = [
                    {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
                    for name, data in files.items()
                ]
                return self._send_json(listing)
            if api[2] == "commits":
                return self._send_json([{"id": commit, "title": "", "message": "", "date": model.dates[commit], "authors": []}])
            with_sizes = "blobs=" in urlsplit(self.path).query
            siblings = [{"rfilename": name} | ({"size": len(data)} if with_sizes else {}) for name, data in files.items()]
            return self._send_json({"id": match[1], "modelId": match[1], "sha": commit, "siblings": siblings})
        assert file is not None
        if model.gated:
            return self._fail(403, "GatedRepo", "Access to this model is restricted")
        if file[3] not in files:
            return self._fail(404, "EntryNotFound", "Entry not found", commit)
        data = files[file[3]]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest_of(data, "sha1")}"', "Accept-Ranges": "bytes"}
        if file[3].endswith((".safetensors", ".bin")) and not cdn:
            told = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest_of(data, "sha256")}"'}
            return self._send(302, b"", headers | (told if hub.linked else {}) | {"Location": hub.sign(quote(path))})
        if not cdn and not urlsplit(self.path).query:  # small files are led to another address of the Hub itself
            return self._send(307, b"", headers | {"Location": f"{quote(path)}?cached=1"})
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or not model.ranges:
            return self._send(200, data, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        if start >= len(data):
            return self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(206, data[start:stop], headers)

    def _fail(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, b"{}", headers | ({"X-Repo-Commit": commit} if commit else {}))

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        sent = 0
        try:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                for start in range(0, len(body), 1 << 14):
                    sent += self.wfile.write(body[start : start + (1 << 14)])
        except OSError:  # the client had enough
            self.close_connection = True
        path = unquote(urlsplit(self.path).path)
        self.server_hub.requests.append(Request(self.command, path, status, sent, self.headers.get("Authorization")))
