"""Runs a client's script inside the product: the site it talks to, the policy it gets, the directory it lives in.

The supervisor is started with a bare environment: whatever proxy or trust the workload finds is the supervisor's doing.
"""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import table
from content import Content
from upstream import Identity, Upstream

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "e2e"))

import product

HOST, ELSEWHERE = "files.clients.test", "elsewhere.clients.test"
PORT, GRPC_PORT = 18500, 18501
PROGRAMS = pathlib.Path(__file__).parent / "programs"
SECONDS = 40.0


@dataclass(frozen=True)
class Site:
    """The upstream of a test session, and the options by which a supervisor reaches it."""

    address: str
    identity: Identity
    upstream: Upstream
    content: Content

    @property
    def url(self) -> str:
        """Where the listed host is."""
        return f"https://{HOST}:{PORT}"

    def options(self) -> list[str]:
        """Both names lead to the upstream, so that a request that should have been refused would be answered."""
        pins = [f"--resolve={name}={self.address}" for name in (HOST, ELSEWHERE)]
        return [*pins, f"--upstream-ca={self.identity.root}"]


@dataclass(frozen=True)
class Outcome:
    """What one line of a script came to: exit status, and stdout with stderr."""

    step: table.Step
    code: int
    text: str


def site_address() -> str:
    """An address of 127.0.0.0/16 for this session alone, so that two sessions may use the same ports."""
    return f"127.0.{64 + secrets.randbelow(128)}.{2 + secrets.randbelow(250)}"


def policy(allows: Sequence[str], *, inspected: bool, encoded_slash: bool = False) -> str:
    """A policy (YAML, written as JSON) that lists the host: by method and path, or as a tunnel."""
    endpoints = [{"host": HOST, "port": port} for port in (PORT, GRPC_PORT)]
    if inspected:
        rules = [dict(zip(("method", "path"), entry.split(" "), strict=True)) for entry in allows]
        extra = {"protocol": "rest", "enforcement": "enforce", "rules": [{"allow": rule} for rule in rules]}
        endpoints = [{**endpoint, **extra} for endpoint in endpoints]
        if encoded_slash:
            endpoints = [{**endpoint, "allow_encoded_slash": True} for endpoint in endpoints]
    rule = {"endpoints": endpoints, "binaries": [{"path": "/**"}]}
    return json.dumps({"version": 1, "network_policies": {"clients": rule}})


def bare(line: list[str]) -> list[str]:
    """Start the supervisor with nothing but a PATH: no proxy, trust or registry setting of this machine."""
    return ["env", "-i", f"PATH={os.environ['PATH']}", "LANG=C.UTF-8", *line]


def live(client: table.Client, mode: str, site: Site, home: pathlib.Path) -> tuple[list[Outcome], product.Ran]:
    """Run the lines of the script that `mode` asks for, in one sandbox; answers what came of each, and the run."""
    steps = [step for step in client.script if step.kind != "denied" or mode == table.INSPECTED]
    furnish(client, home, site)
    settings = {
        "HOME": str(home),
        "TMPDIR": str(home),
        "MODE": mode,
        "URL": site.url,
        "ELSEWHERE": f"https://{ELSEWHERE}:{PORT}",
        "GRPC": f"{HOST}:{GRPC_PORT}",
        "PY": sys.executable,
        "PATH": f"{home}/bin:{os.environ['PATH']}",
    }
    script = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    for number, step in enumerate(steps):
        script += [f"cd {home}; sh -c {shlex.quote(step.line)} >{number}.out 2>&1; echo $? >{number}.code"]
    ran = product.run(
        ["sh", "-c", "\n".join(script)],
        policy=policy(client.allows, inspected=mode == table.INSPECTED, encoded_slash=client.encoded_slash),
        options=site.options(),
        wrap=bare,
        timeout=SECONDS,
    )
    outcomes = [
        Outcome(step, int((home / f"{n}.code").read_text()), (home / f"{n}.out").read_text(errors="replace"))
        for n, step in enumerate(steps)
    ]
    return outcomes, ran


def furnish(client: table.Client, home: pathlib.Path, site: Site) -> None:
    """A home that the workload's user may write, with the programs of these tests and what some clients must be told."""
    shutil.copytree(PROGRAMS, home / "programs")
    shutil.copy(site.identity.root, home / "up.pem")
    (home / "bin").mkdir()
    if "cargo" in client.needs:
        shutil.copy(_cargo(), home / "bin")
    for path in (home, *home.rglob("*")):
        path.chmod(0o777)


def _cargo() -> str:
    """The program itself: rustup's stand-in looks for toolchains in a home that the workload's user may not enter."""
    if shutil.which("rustup") is None:
        return str(shutil.which("cargo"))
    found = subprocess.run(["rustup", "which", "cargo"], capture_output=True, text=True, timeout=10, check=True)
    return found.stdout.strip()


def missing(needs: Sequence[str]) -> str:
    """What this machine lacks of `needs` ("node>=22.21", "git"), or an empty string."""
    absent = [name for name in map(_program, needs) if shutil.which(name) is None]
    return f"needs the client program {absent[0]}" if absent else ""


def for_this_version(needs: Sequence[str]) -> bool:
    """False when a condition on the version ("node<22.21") does not fit the program that is here; the table then has a row
    for the other versions."""
    for need in needs:
        name, condition = _program(need), need.removeprefix(_program(need))
        if condition and shutil.which(name) is not None:
            done = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=True)
            here = tuple(int(part) for part in done.stdout.strip().lstrip("v").split(".")[:2])
            bound = tuple(int(part) for part in condition.lstrip("<>=").split("."))
            if (here >= bound) != condition.startswith(">="):
                return False
    return True


def _program(need: str) -> str:
    return need.partition(">=")[0].partition("<")[0]
