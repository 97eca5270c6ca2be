"""Rootless Podman on a machine not made for it: no systemd, hybrid cgroups, no registry; and nothing changed outside.

`RootlessHost` is a private mount and PID namespace with a plain cgroup2 and a user of its own (with subordinate uids)
that exists only in there. Images and the base tar are kept in a cache directory outside of the repository; containers,
mounts and processes die with the namespace, also when the test run is killed. It knows nothing of what the image does.
"""

from __future__ import annotations

import configparser
import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CACHE = pathlib.Path(os.environ.get("OSS_E2E_CACHE", "/var/cache/oss-e2e"))

# Outside of what useradd and its subuid ranges hand out (login.defs: uids to 60000, subuids to 600100000).
UID = 64100
SUBUIDS = 700_000_000

READY_TIMEOUT = 10.0  # namespaces and a dozen mounts: well under a second
LOCK_TIMEOUT = 300.0  # another test run with the same cache: as long as a cold one takes
DEBOOTSTRAP_TIMEOUT = 300.0  # a minute with a near mirror
BUILD_TIMEOUT = 300.0  # 20 s measured, most of it downloads
PODMAN_TIMEOUT = 60.0

# CAP_SYS_RESOURCE may be missing here, so Podman must not raise limits; cgroups without systemd are not delegated.
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
RUN_OPTIONS = ("--cgroups=disabled", *LIMITS, "--network=slirp4netns")
CA_BUNDLE = pathlib.Path("/etc/ssl/certs/ca-certificates.crt")
BUILD_MOUNTS = pathlib.Path("/run/build")
PROGRAMS = ("podman", "crun", "slirp4netns", "newuidmap", "unshare", "nsenter", "setpriv")


def missing() -> str:
    """What this machine lacks for rootless Podman, or an empty string."""
    if os.geteuid() != 0:
        return f"needs root to prepare the namespaces: this is uid {os.geteuid()}"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(absent)} (Debian: podman crun slirp4netns uidmap)" if absent else ""


class RootlessHost:
    """The namespaces, and Podman in them. A context manager; a lock keeps it to one at a time per cache directory."""

    def __init__(self, cache: pathlib.Path = CACHE) -> None:
        self.cache = cache
        self.state = cache / "podman"
        self.home = self.state / "home"
        self.run_dir = self.state / "run"

    def __enter__(self) -> RootlessHost:
        for path in (self.cache, self.state, self.run_dir, self.home):
            path.mkdir(mode=0o755, exist_ok=True, parents=True)
        os.chown(self.home, UID, UID)
        self._lock = _locked(self.state / "lock")
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
             str(HERE / "rootless-host"), str(self.state), str(UID), str(SUBUIDS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.strip() != "ready":
            self.__exit__()
            raise RuntimeError(f"the private namespaces could not be made: {line!r}")
        children = pathlib.Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self.holder, self.inside = self._process.pid, int(children.split()[0])
        self._write_settings()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(READY_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._lock.close()

    def _write_settings(self) -> None:
        config = self.home / ".config" / "containers"
        config.mkdir(parents=True, exist_ok=True)
        for path in (config.parent, config):
            os.chown(path, UID, UID)
        (config / "storage.conf").write_text('[storage]\ndriver = "overlay"\n')
        (config / "containers.conf").write_text('[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n')

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` as the user of this host, in its namespaces, with a clean environment."""
        identity = [f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all"]
        environment = [
            f"HOME={self.home}",
            f"XDG_RUNTIME_DIR={self.run_dir / 'user'}",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        ]
        inside = ["nsenter", f"--target={self.inside}", "--mount", "--pid", "--", "setpriv", *identity]
        return [*inside, "env", "-i", "-C", str(self.home), "LANG=C.UTF-8", *environment, *argv]

    def podman(
        self, *args: str, timeout: float = PODMAN_TIMEOUT, stdin: IO[bytes] | None = None, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run one Podman command to its end; with `check`, a failure raises with what it wrote."""
        source = stdin if stdin is not None else subprocess.DEVNULL
        done = subprocess.run(
            self.command(["podman", *args]),
            stdin=source,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise RuntimeError(
                f"podman {args[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        return done

    def base_image(self) -> str:
        """The name of the base image, imported; made from the mirror when neither it nor its tar is cached."""
        recipe = ROOT / "scripts" / "make-base-image"
        key = hashlib.sha256(recipe.read_bytes()).hexdigest()[:12]
        name = f"localhost/oss-e2e-base:{key}"
        if self.podman("image", "exists", name).returncode == 0:
            return name
        tar = self.cache / f"base-{key}.tar"
        if not tar.exists():
            for stale in self.cache.glob("base-*.tar*"):  # of a recipe that has changed since
                stale.unlink()
            subprocess.run([str(recipe), str(tar)], check=True, timeout=DEBOOTSTRAP_TIMEOUT, stdin=subprocess.DEVNULL)
        with tar.open("rb") as stream:
            self.podman("import", "-", name, stdin=stream, check=True)
        return name

    def build(self, context: pathlib.Path, tag: str) -> str:
        """Build the image of `context` on the base image; unchanged layers come from the cache. Returns `tag`."""
        base = self.base_image()
        mounts = [f"--volume={path}:{inside}:ro" for path, inside in self._build_mounts()]
        options = ["--isolation=chroot", "--network=host", *LIMITS, f"--build-arg=BASE_IMAGE={base}", *mounts]
        self.podman("build", *options, f"--tag={tag}", str(context), timeout=BUILD_TIMEOUT, check=True)
        self.podman(
            "image", "prune", "--force", "--filter", "until=48h"
        )  # bounds the cache; a prune too much costs seconds
        return tag

    def _build_mounts(self) -> list[tuple[pathlib.Path, pathlib.Path]]:
        """What the build needs of this machine to reach its package index: the CA bundle and pip's configuration.

        Not at the bundle's own path: a mount there would stop the ca-certificates package from being installed.
        """
        settings = {"cert": str(CA_BUNDLE)} if CA_BUNDLE.exists() else {}
        settings |= _pip_settings()
        named = {key: pathlib.Path(value) for key, value in settings.items() if value.startswith("/")}
        inside = {key: BUILD_MOUNTS / key for key, path in named.items() if path.exists()}
        parser = configparser.ConfigParser(interpolation=None)
        parser["global"] = settings | {key: str(path) for key, path in inside.items()}
        config = self.run_dir / "user" / "pip.conf"  # a tmpfs that only these namespaces see: it may hold a credential
        writer = self.command(["sh", "-c", f"umask 077; cat > {config}"])
        with subprocess.Popen(writer, stdin=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            parser.write(process.stdin)
        return [*((named[key], path) for key, path in inside.items()), (config, pathlib.Path("/etc/pip.conf"))]


def _pip_settings() -> dict[str, str]:
    """pip's effective global settings, from files and environment, the environment winning as it does for pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PODMAN_TIMEOUT).stdout
    pairs = [line.split("=", 1) for line in listing.splitlines() if line.startswith(("global.", ":env:."))]
    ordered = sorted(pairs, key=lambda pair: pair[0].startswith(":env:"))
    return {key.removeprefix("global.").removeprefix(":env:."): value.strip("'\"") for key, value in ordered}


def _locked(path: pathlib.Path) -> IO[str]:
    """An exclusive lock on `path`, held until the returned file is closed."""
    stream = path.open("w")
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"another run holds {path}") from None
            time.sleep(0.5)
        else:
            return stream
