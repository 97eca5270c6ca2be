"""What the upstream of these tests serves: files, redirects, a big download, and small but real registries and a repository.

Each protocol is the real one, as its client asks for it: PEP 503, the npm registry, the Go module proxy, the sparse cargo
index, git's smart HTTP through `git http-backend`. Everything lies under a first folder that a policy can name.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator

from upstream import Answer, Request

HELLO = b"hello from the real upstream\n"
SECRET = b"nobody may read this\n"
# A big download is one block, repeated, so that the server's memory stays flat too.
BLOCK = os.urandom(1 << 20)
SLOW_PIECES, SLOW_PAUSE = (b"data: 1\n", b"data: 2\n", b"data: 3\n"), 0.3
GIT_SECONDS = 20


def big_digest(blocks: int) -> str:
    """SHA-256 of the download /public/big?BLOCKS, of as many MiB."""
    digest = hashlib.sha256()
    for _ in range(blocks):
        digest.update(BLOCK)
    return digest.hexdigest()


class Content:
    """Answers requests. `url` is where clients reach it (for the registries' links); `directory` is where it may keep files."""

    def __init__(self, url: str, directory: pathlib.Path) -> None:
        self.url, self.directory = url, directory
        self.files: dict[str, tuple[str, bytes]] = {}
        for publish in (_python_index, _npm_registry, _go_proxy, _cargo_index):
            self.files |= publish(url)
        if shutil.which("git"):
            _git_repository(directory)
        self.folders: dict[str, Callable[[Request], Answer]] = {
            "git": self._git,
            "public": self._public,
            "up": _uploaded,
        }

    def __call__(self, request: Request) -> Answer:
        """The whole site: first the exact files, then the folders, else 404."""
        path = request.path.replace("%2F", "%2f")
        if path in self.files:
            kind, body = self.files[path]
            return Answer(body, headers={"content-type": kind})
        folder = self.folders.get(request.path.split("/")[1])
        return folder(request) if folder else Answer(b"no such file\n", 404)

    def _public(self, request: Request) -> Answer:
        match request.path.removeprefix("/public/"):
            case "hello":
                return Answer(HELLO)
            case "redirect":
                return Answer(status=302, headers={"location": f"{self.url}/public/again"})
            case "again":
                return Answer(status=307, headers={"location": "/public/hello"})
            case "away":
                return Answer(status=302, headers={"location": f"{self.url}/private/secret"})
            case "api":
                return Answer(json.dumps({"name": "real", "http": request.version}).encode())
            case "slow":
                return Answer(_slowly(), length=len(SLOW_PIECES) * len(SLOW_PIECES[0]))
            case "big":
                blocks = int(request.query)
                return Answer((BLOCK for _ in range(blocks)), length=blocks * len(BLOCK))
        return Answer(b"no such file\n", 404)

    def _git(self, request: Request) -> Answer:
        """git http-backend as any web server runs it (git-http-backend(1), CGI: RFC 3875)."""
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self.directory / "git"),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": request.headers.get("git-protocol", ""),
            "GIT_CONFIG_NOSYSTEM": "1",
            "HOME": str(self.directory),
            "REMOTE_USER": "tester",  # what makes the backend accept a push
            "PATH_INFO": request.path.removeprefix("/git"),
            "QUERY_STRING": request.query,
            "REQUEST_METHOD": request.method,
            "CONTENT_TYPE": request.headers.get("content-type", ""),
            "CONTENT_LENGTH": str(len(request.body)),
            "HTTP_CONTENT_ENCODING": request.headers.get("content-encoding", ""),
        }
        done = subprocess.run(
            ["git", "http-backend"], input=request.body, env=environment, capture_output=True, timeout=GIT_SECONDS
        )
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if line)
        return Answer(body, int(fields.pop("Status", "200").split()[0]), {k.lower(): v for k, v in fields.items()})


def _slowly() -> Iterator[bytes]:
    """As a model's answer comes: a piece, a pause, a piece."""
    for piece in SLOW_PIECES:
        yield piece
        time.sleep(SLOW_PAUSE)


def _uploaded(request: Request) -> Answer:
    """The digest of what arrived, so that a client can tell that all of it did."""
    return Answer(f"{len(request.body)} {hashlib.sha256(request.body).hexdigest()}\n".encode())


def _archive(files: dict[str, str]) -> bytes:
    """A .tar.gz."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return made.getvalue()


def _zip(files: dict[str, str]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return made.getvalue()


def _python_index(url: str) -> dict[str, tuple[str, bytes]]:
    """PEP 503 with one wheel (PEP 427)."""
    info = "tiny_real-1.0.dist-info"
    files = {
        "tiny_real.py": "WORD = 'installed through the sandbox'\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-real\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    wheel, name = _zip({**files, f"{info}/RECORD": record}), "tiny_real-1.0-py3-none-any.whl"
    link = f"{url}/pypi/files/{name}#sha256={hashlib.sha256(wheel).hexdigest()}"
    return {
        "/pypi/simple/tiny-real/": ("text/html", f'<!DOCTYPE html><a href="{link}">{name}</a>'.encode()),
        f"/pypi/files/{name}": ("application/zip", wheel),
    }


def _npm_registry(url: str) -> dict[str, tuple[str, bytes]]:
    """Two packages, one of them scoped: its document is asked for with %2f in the path, as npm does."""
    files = {}
    for name, address in (("tiny-real", "tiny-real"), ("@real/tiny", "@real%2ftiny")):
        code = "module.exports = 'installed through the sandbox'"
        manifest = {"name": name, "version": "1.0.0", "description": "a real package", "main": "index.js"}
        ball = _archive({"package/package.json": json.dumps(manifest), "package/index.js": code})
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(ball).digest()).decode()
        path = f"/npm/{name}/-/tiny-1.0.0.tgz"
        version = {**manifest, "dist": {"tarball": url + path, "integrity": integrity}}
        document = {"name": name, "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
        files[f"/npm/{address}"] = ("application/json", json.dumps(document).encode())
        files[path] = ("application/octet-stream", ball)
    return files


def _go_proxy(url: str) -> dict[str, tuple[str, bytes]]:
    """The GOPROXY protocol for one module (go.dev/ref/mod, "GOPROXY protocol")."""
    module, version = "real.test/tiny", "v1.0.0"
    mod, base = f"module {module}\n\ngo 1.20\n", f"/go/{module}/@v"
    code = _zip({f"{module}@{version}/go.mod": mod, f"{module}@{version}/tiny.go": "package tiny\n"})
    return {
        f"{base}/list": ("text/plain", f"{version}\n".encode()),
        f"{base}/{version}.info": ("application/json", json.dumps({"Version": version}).encode()),
        f"{base}/{version}.mod": ("text/plain", mod.encode()),
        f"{base}/{version}.zip": ("application/zip", code),
    }


def _cargo_index(url: str) -> dict[str, tuple[str, bytes]]:
    """A sparse index with one crate (RFC 2789 of Rust)."""
    manifest = '[package]\nname = "tiny-real"\nversion = "1.0.0"\nedition = "2021"\n'
    crate = _archive({"tiny-real-1.0.0/Cargo.toml": manifest, "tiny-real-1.0.0/src/lib.rs": ""})
    line = {"name": "tiny-real", "vers": "1.0.0", "deps": [], "features": {}, "yanked": False}
    line["cksum"] = hashlib.sha256(crate).hexdigest()
    return {
        "/cargo/config.json": ("application/json", json.dumps({"dl": f"{url}/cargo/dl"}).encode()),
        "/cargo/ti/ny/tiny-real": ("text/plain", json.dumps(line).encode()),
        "/cargo/dl/tiny-real/1.0.0/download": ("application/octet-stream", crate),
    }


def _git_repository(directory: pathlib.Path) -> None:
    """`git/real.git`, bare, with one commit on main."""
    work, bare = directory / "work", directory / "git" / "real.git"

    def git(*words: str, where: pathlib.Path) -> None:
        identity = ["-c", "user.name=tester", "-c", "user.email=tester@clients.test"]
        subprocess.run(["git", *identity, *words], cwd=where, check=True, capture_output=True, timeout=GIT_SECONDS)

    bare.mkdir(parents=True)
    work.mkdir()
    git("init", "-q", "--bare", "-b", "main", where=bare)
    git("init", "-q", "-b", "main", where=work)
    (work / "README").write_text("cloned through the sandbox\n")
    git("add", "README", where=work)
    git("commit", "-q", "-m", "first", where=work)
    git("push", "-q", str(bare), "main", where=work)
