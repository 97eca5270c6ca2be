"""The product inside gVisor: one call runs it in a sandbox of `runsc`, and answers as `product.run` does.

The sandbox sees this machine's programs and this checkout under an overlay in memory, so nothing that happens in there stays.
Around it lies a network namespace with public addresses and a server on them: with `--network=host` that namespace is what
gVisor calls the host. It knows nothing of what the product does.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(HERE.parent))

import product  # noqa: E402  (its directory was just added)

import hosts  # noqa: E402

BUILD_TIMEOUT = 600.0  # 50 s on two idle cores; it runs at the lowest priority beside other tests
TIMEOUT = 90.0  # 2 s measured
# TEST-NET-3 (RFC 5737): public as far as the product knows, and held by lo of the world. The server answers on both.
UPSTREAM, ELSEWHERE, PORT = "203.0.113.7", "203.0.113.8", 8080
GREETING = "the upstream answers"

# Docker's default set (moby/profiles/capabilities), less NET_RAW, and what OpenShell's drivers add.
DRIVER_CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in (
        "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP", "SETGID",
        "SETPCAP", "SETUID", "SYS_CHROOT", "SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "SYSLOG", "DAC_READ_SEARCH",
    )
)  # fmt: skip


@dataclass(frozen=True)
class User:
    """Who the container's runtime starts the product as; no capabilities means that they were dropped before."""

    uid: int = 0
    capabilities: tuple[str, ...] = ()


DRIVER = User(capabilities=DRIVER_CAPABILITIES)
ROOT_WITHOUT = User()
PRE_DROPPED = User(uid=hosts.THROWAWAY_UID)

# Runs in the world: what is on the address, then the sandbox ("$@"). The namespaces end with it, and everything in them.
WORLD = f"""
ip link set lo up && ip address add {UPSTREAM}/32 dev lo && ip address add {ELSEWHERE}/32 dev lo || exit 99
"$PYTHON" -m http.server {PORT} --bind 0.0.0.0 --directory "$PLACE/www" >/dev/null 2>&1 &
for _ in 1 2 3 4 5 6 7 8 9 10; do
  [ "$(curl -s http://{UPSTREAM}:{PORT}/hello)" = "{GREETING}" ] && exec "$@"
  sleep 0.3
done
echo "the upstream does not answer" >&2
exit 99
"""
# Runs in the sandbox: the product ("$@"), then the files that it left, because nothing written in there can be read from outside.
RECORDER = """
"$@"; code=$?
for name in status.json events.jsonl; do
  printf '\\n%s %s\\n' "$MARK" "$name"
  cat "$PLACE/$name" 2>/dev/null
done
exit $code
"""
MARK = "=====left-by-the-product"


def missing() -> str:
    """What this machine lacks for running gVisor, or an empty string."""
    if os.geteuid() != 0:
        return f"needs root for the world around gVisor: this is uid {os.geteuid()}"
    return "" if shutil.which("go") else "needs the client program go to build gVisor's runsc (scripts/gvisor)"


def build() -> str:
    """The path of runsc, built if the cache lacks it. Raises `RuntimeError` with the end of what the build said."""
    done = subprocess.run(
        [ROOT / "scripts/gvisor"],
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise RuntimeError(f"scripts/gvisor: exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.strip()


@dataclass(frozen=True)
class Gvisor:
    """A built runsc."""

    runsc: str

    def run(
        self,
        command: Sequence[str],
        *,
        network: str = "host",
        user: User = DRIVER,
        policy: str = product.DENY_ALL,
        options: Sequence[str] = (),
        env: dict[str, str] | None = None,
        rootless: bool = False,
    ) -> product.Ran:
        """Run the product with `command` as workload; `network` is runsc's (host, none: a stack of its own with lo alone).

        `rootless` starts runsc as an unprivileged user, which then is the only one that the sandbox may have.
        """
        with tempfile.TemporaryDirectory(prefix="oss-gvisor-") as name:
            place = pathlib.Path(name)
            place.chmod(0o777)  # in there, whoever runs the product leaves its files in it
            line = ["sh", "-c", RECORDER, "recorder", *product.argv(place, policy, command, options)]
            done = self.sandbox(place, line, network=network, user=user, env=env or {}, rootless=rootless)
            out, *left = done.stdout.split(f"\n{MARK} ")
            files = dict(text.split("\n", 1) for text in left)
            assert set(files) == {"status.json", "events.jsonl"}, done.stderr[-3000:]
            return product.Ran(
                done.returncode,
                out,
                done.stderr,
                json.loads(files["status.json"]) if files["status.json"].strip() else None,
                _events(files["events.jsonl"]),
            )

    def sandbox(
        self,
        place: pathlib.Path,
        argv: Sequence[str],
        *,
        network: str = "host",
        user: User = DRIVER,
        env: dict[str, str] | None = None,
        rootless: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` to its end in a sandbox in the world, with `place` for the bundle and runsc's state."""
        (place / "www").mkdir()
        (place / "www" / "hello").write_text(GREETING)
        bundle, state = place / "bundle", place / "state"
        for path in (bundle, state, bundle / "rootfs"):
            path.mkdir()
        environment = {"PATH": os.environ["PATH"], "PLACE": str(place), "MARK": MARK, **(env or {})}
        (bundle / "config.json").write_text(
            json.dumps(_spec(argv, user, environment, _files(bundle / "rootfs", place)))
        )
        runsc = [self.runsc, f"--rootless={str(rootless).lower()}", "--root", str(state), "--ignore-cgroups",
                 f"--network={network}", "--platform=systrap", "--overlay2=all:memory",
                 "run", "--bundle", str(bundle), f"oss-{place.name[-8:]}"]  # fmt: skip
        if rootless:
            for path in (state, bundle / "rootfs"):
                os.chown(path, hosts.THROWAWAY_UID, hosts.THROWAWAY_UID)
            runsc = hosts.unprivileged(runsc, home=place)
        return subprocess.run(
            ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", WORLD, "world", *runsc],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            cwd="/",
            env={**os.environ, "PLACE": str(place), "PYTHON": sys.executable},
        )


def _events(text: str) -> list[dict[str, Any]]:
    """The events of a file, each held against the schema."""
    events = [json.loads(line) for line in text.splitlines() if line]
    for event in events:
        product.schema.assert_valid(event)
    return events


def _files(rootfs: pathlib.Path, place: pathlib.Path) -> list[str]:
    """Make links in `rootfs` as this machine's root directory has them; the directories to be mounted, each at its own path."""
    directories = {"/usr", "/etc", str(ROOT), sys.prefix, sys.base_prefix, str(place)}
    for path in map(pathlib.Path, ("/bin", "/sbin", "/lib", "/lib64")):
        if path.is_symlink():
            (rootfs / path.name).symlink_to(os.readlink(path))
        elif path.is_dir():
            directories.add(str(path))
    return sorted(one for one in directories if not any(one.startswith(f"{other}/") for other in directories))


def _spec(argv: Sequence[str], user: User, env: dict[str, str], directories: Sequence[str]) -> dict[str, Any]:
    """An OCI configuration (runtime-spec config.md) without a network namespace: runsc takes that of whoever starts it."""
    process = {
        "terminal": False,
        "user": {"uid": user.uid, "gid": user.uid},
        "args": list(argv),
        "env": [f"{key}={value}" for key, value in env.items()],
        "cwd": "/",
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), user.capabilities),
    }
    kernel = (("proc", "proc"), ("sys", "sysfs"), ("dev", "tmpfs"), ("run", "tmpfs"), ("tmp", "tmpfs"))
    mounts = [{"destination": f"/{name}", "type": kind, "source": kind} for name, kind in kernel]
    mounts += [{"destination": one, "type": "bind", "source": one, "options": ["bind"]} for one in directories]
    return {
        "ociVersion": "1.0.0",
        "process": process,
        "root": {"path": "rootfs", "readonly": False},
        "hostname": "gvisor",
        "mounts": mounts,
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]},
    }
