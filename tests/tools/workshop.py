"""Runs rows of the table inside the product: all that a world wants go into one sandbox, each in a directory of its own."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import toolbox

import hosts

# Not this machine's: where images keep programs, and where the Go toolchain's own instructions put it.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin"
PROGRAMS = pathlib.Path(__file__).parent / "programs"
IDENTITY = 64002  # a number without a passwd entry, and not the one of hosts.unprivileged
ROW_SECONDS, SECONDS = 40, 110
# What a row's script finds beside the environment that the product gives: a home of its own, and where things are.
ROW = """
mkdir "$1" && cd "$1" && export HOME=$PWD && timeout {seconds} bash ../"$1".sh > ../"$1".out 2>&1 < /dev/null
echo $? > ../"$1".code
"""


@dataclass(frozen=True)
class World:
    """How the product is started: as root or as a plain user, with the built-in policy or one of its own, and the options."""

    root: bool
    own_policy: bool = False
    options: tuple[str, ...] = ()


WORLDS = {
    toolbox.DEFAULT: World(root=True),
    toolbox.POLICY: World(root=True, own_policy=True),
    toolbox.USER: World(root=False),
    toolbox.HOST: World(root=True, options=("--host-network",)),
}


@dataclass
class Lived:
    """What came of a world: exit status and text for each row, by name, and the supervisor's own end."""

    code: int
    err: str
    statement: dict[str, Any]
    rows: dict[str, tuple[int, str]] = field(default_factory=dict)


def policy(programs: str) -> str:
    """A policy (YAML, written as JSON) with a numeric identity, network rules, and two places that a default lacks: the
    interpreter of these tests, which may lie in somebody's home, and the programs of these tests."""
    read_only = ["/usr", "/lib", "/etc", "/proc", sys.base_prefix, programs]
    rule = {"endpoints": [{"host": "files.tools.test", "port": 443}], "binaries": [{"path": "/**"}]}
    made = {
        "version": 1,
        "filesystem_policy": {"include_workdir": True, "read_only": read_only, "read_write": ["/tmp"]},
        "landlock": {"compatibility": "best_effort"},
        "process": {"run_as_user": str(IDENTITY), "run_as_group": str(IDENTITY)},
        "network_policies": {"files": rule},
    }
    return json.dumps(made)


def live(name: str, tools: Sequence[toolbox.Tool], directory: pathlib.Path, outside: pathlib.Path) -> Lived:
    """Run the rows in the world `name`, two at a time (a small machine has two processors).

    `directory` is empty and everybody's; `outside` is a directory beyond the file rules.
    """
    world, work = WORLDS[name], directory / "work"
    names = furnish(tools, work)
    settings = {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "PY": interpreter(name),
        "PROGRAMS": str(work / "programs"),
        "OUTSIDE": str(outside),
        "HOME": str(work),
    }
    options = [
        "--workdir",
        str(work),
        "--status-file",
        str(directory / "status.json"),
        "--log-level",
        "error",
        *world.options,
    ]
    if world.own_policy:
        (directory / "policy.yaml").write_text(policy(str(work / "programs")))
        options += ["--policy", str(directory / "policy.yaml")]
    every = f"printf '%s\\n' {' '.join(names.values())} | xargs -P 2 -n 1 bash {work}/row"
    line = ["env", "-i", *(f"{key}={value}" for key, value in settings.items())]
    line += [sys.executable, "-m", "openshell_supervisor", "run", *options, "--", "bash", "-c", every]
    done = subprocess.run(
        line if world.root else hosts.unprivileged(line),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        cwd="/",
    )
    status = directory / "status.json"
    lived = Lived(done.returncode, done.stderr, json.loads(status.read_text()) if status.exists() else {})
    for tool, file in names.items():
        code, out = work / f"{file}.code", work / f"{file}.out"
        if code.exists():
            lived.rows[tool] = (int(code.read_text()), out.read_text(errors="replace"))
    return lived


def furnish(tools: Sequence[toolbox.Tool], work: pathlib.Path) -> dict[str, str]:
    """The workspace, with a script for each row and the programs; answers the script's name for each row's."""
    shutil.copytree(PROGRAMS, work / "programs", ignore=shutil.ignore_patterns("__pycache__"))
    (work / "row").write_text(ROW.format(seconds=ROW_SECONDS))
    names = {tool.name: f"row{number}" for number, tool in enumerate(tools)}
    for tool in tools:
        (work / f"{names[tool.name]}.sh").write_text(tool.types)
    for path in (work, *work.rglob("*")):
        path.chmod(0o777)
    return names


def interpreter(world: str) -> str:
    """The Python that a world's policy lets run: this one's own interpreter where the policy lists it, else the system's."""
    own = pathlib.Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    if WORLDS[world].own_policy or own.is_relative_to("/usr"):
        return str(own)
    return shutil.which("python3", path=PATH) or ""


def missing(tool: toolbox.Tool, world: str) -> str:
    """What this machine lacks for a row in a world, or an empty string."""
    lacking = hosts.missing_for_root_tests()
    if WORLDS[world].root and lacking:
        return lacking
    if "PY" in tool.needs and not interpreter(world):
        return "needs the client program python3 among the system's"
    absent = [name for name in tool.needs if name != "PY" and shutil.which(name, path=PATH) is None]
    return f"needs the client program {absent[0]}" if absent else ""


def constrained_memory(prefix: Sequence[str]) -> int:
    """How much memory Node.js believes that it has, in bytes, run behind `prefix`; 0 when it cannot know."""
    line = [*prefix, "env", f"PATH={PATH}", "node", "-p", "process.constrainedMemory()"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS, check=True, cwd="/")
    return int(float(done.stdout))
