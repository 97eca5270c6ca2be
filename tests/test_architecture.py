"""The shape of the house: which room may import which, and how long a module or a function may grow.

The arrows are those of CONTRIBUTING.md. They are read from the source (imports inside functions count; those under
`if TYPE_CHECKING` too), so nothing needs to be importable.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

PACKAGE = "openshell_supervisor"
SOURCE = pathlib.Path(__file__).resolve().parent.parent / "src" / PACKAGE

MODULE_LINES = 500  # the hard limit; 150-300 is what a module should have
FUNCTION_LINES, FUNCTION_LINES_REPORTED = 60, 40

# What everything may import, and which imports nothing but itself ("" is the package's own __init__).
GROUND = {"enforcement", "errors", ""}
# The story, the modules it is split into, the rehearsal of it, and who asks for them.
TOP = {"supervisor", "preparation", "sandbox", "inside", "ascent", "outfit", "rehearsal", "doctor", "cli", "__main__"}
# Room -> what else of ours it may import. A room that is not here may be imported by TOP only, and imports only GROUND.
ARROWS: dict[str, set[str]] = {
    "enforcement": set(),
    "errors": {"enforcement"},
    "settings": {"policy.model", "still_to_come", "named", "main_process"},
    "named": set(),
    "main_process": {"named"},
    # The readers of the statement, and the run directory.
    "report": {"telemetry.events"},
    "layers": {"confine", "policy.model"},
    "still_to_come": set(),
    "rundir": set(),
    "home": {"confine"},
    "imports": set(),
    "policy": set(),
    "verdict": {"policy"},
    # Asks the same `decide`, and the same check of addresses, as the proxy.
    "explain": {"verdict", "policy", "proxy.destinations"},
    # Who asks: sockets, processes and files; the policy only for the links that its binaries are.
    "callers": {"policy.model"},
    "boundary": {"telemetry.events", "policy.model"},
    "confine": {"telemetry.events", "telemetry.plain_log", "policy.model"},
    "workload": {"telemetry.events", "telemetry.plain_log", "policy.model"},
    "proxy": {"verdict", "callers", "telemetry.events", "telemetry.plain_log", "policy.model"},
    "gateway": {"telemetry.events", "policy"},
    "sidecar": {"telemetry.events", "policy.model"},
    "telemetry": set(),
}
# A library that one room alone may know.
OWNED = {
    "mitmproxy": "proxy",
    "mitmproxy_rs": "proxy",
    "pyroute2": "boundary",
    "grpc": "gateway",
    "pyseccomp": "confine",
    "landlock": "confine",
}
# The launcher is exec'd alone, with an empty environment: it knows itself and the standard library.
STANDALONE = "confine.launcher"


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    name: str  # without the package, "proxy.tunnel"; the package itself is ""
    path: pathlib.Path
    tree: ast.Module
    lines: tuple[str, ...]

    @property
    def room(self) -> str:
        """The first part of the name: a directory, or a module at the top."""
        return self.name.partition(".")[0]

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and absolute dotted name of everything imported; `from a import b` gives a.b."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = self._absolute(node)
                yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        here = [PACKAGE, *(part for part in self.name.split(".") if part)]
        if self.path.name != "__init__.py":
            here.pop()
        kept = here[: len(here) - node.level + 1]
        return ".".join([*kept, *([node.module] if node.module else [])])


def read(root: pathlib.Path) -> list[Module]:
    """Every module below `root`; generated ones (`_generated`) are nobody's style."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if "_generated" in parts:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        found.append(Module(name, path, ast.parse(text, str(path)), tuple(text.splitlines())))
    return found


def forbidden_arrows(modules: list[Module]) -> list[str]:
    """Imports of ours that no arrow allows."""
    names = {module.name for module in modules}
    wrong = []
    for module in modules:
        if module.room in TOP:
            continue
        allowed = ARROWS.get(module.room, set()) | (set() if module.room in {"enforcement", "errors"} else GROUND)
        for line, target in module.imports():
            if target.split(".")[0] != PACKAGE:
                continue
            inner = target.removeprefix(PACKAGE).lstrip(".")
            while inner and inner not in names:  # `from module import name`: back to the module
                inner = inner.rpartition(".")[0]
            own = inner.partition(".")[0] == module.room
            if not own and not any(inner == item or (item and inner.startswith(f"{item}.")) for item in allowed):
                wrong.append(f"{module.path.name}:{line}: {module.name or PACKAGE} may not import {inner or target}")
    return wrong


def strangers(modules: list[Module]) -> list[str]:
    """Libraries imported outside of the room that owns them, and anything but the standard library in the launcher."""
    wrong = []
    for module in modules:
        for line, target in module.imports():
            library = target.split(".")[0]
            if OWNED.get(library, module.room) != module.room:
                wrong.append(f"{module.name}:{line}: {library} belongs to {OWNED[library]}/")
            own = target.startswith(f"{PACKAGE}.{STANDALONE}")
            if f"{module.name}.".startswith(f"{STANDALONE}.") and not own and library not in sys.stdlib_module_names:
                wrong.append(f"{module.name}:{line}: {library} is not in the standard library")
    return wrong


def functions(module: Module) -> Iterator[tuple[str, int, int]]:
    """Name, line and length (decorators and docstring left out, blank and comment lines counted) of each function."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None and first.end_lineno is not None:
                length -= first.end_lineno - first.lineno + 1
            yield node.name, node.lineno, length


def unexplained_catch_alls(module: Module) -> list[str]:
    """Handlers of everything that swallow it and give no reason in a comment on the same or the previous line.

    One that ends in a bare `raise` only cleans up. A `noqa` alone is no reason; what follows it may be.
    """
    wrong = []
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = ast.unparse(node.type) if node.type else ""
        if node.type is not None and not re.search(r"\b(Base)?Exception\b", caught):
            continue
        last = node.body[-1]
        if isinstance(last, ast.Raise) and last.exc is None:
            continue
        comment = module.lines[node.lineno - 1].partition("#")[2]
        reason = re.sub(r"\bnoqa(:\s*[A-Z]+\d+(,\s*[A-Z]+\d+)*)?", "", comment)
        if not re.search(r"\w", reason) and not module.lines[node.lineno - 2].strip().startswith("#"):
            wrong.append(f"{module.name}:{node.lineno}")
    return wrong


MODULES = read(SOURCE)


def test_arrows_point_one_way() -> None:
    """supervisor and cli import the rooms; a room imports its listed neighbours and the ground, never back."""
    assert forbidden_arrows(MODULES) == []


def test_libraries_stay_in_their_rooms() -> None:
    """mitmproxy only in proxy/, pyroute2 in boundary/, grpc in gateway/, pyseccomp and landlock in confine/."""
    assert strangers(MODULES) == []


def test_every_room_is_known() -> None:
    """A new room needs its arrows drawn before it is lived in."""
    assert {module.room for module in MODULES} - TOP - GROUND - set(ARROWS) == set()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name or PACKAGE)
def test_a_module_says_what_it_is_for_and_stays_readable(module: Module) -> None:
    """A docstring, at most 500 lines, no function over 60 (over 40 is reported), no unexplained catch-all."""
    assert ast.get_docstring(module.tree), f"{module.path} has no docstring"
    assert len(module.lines) <= MODULE_LINES, f"{module.path} has {len(module.lines)} lines"
    sizes = list(functions(module))
    assert [f"{name}:{line} has {size} lines" for name, line, size in sizes if size > FUNCTION_LINES] == []
    for name, line, size in sizes:
        if size >= FUNCTION_LINES_REPORTED:
            warnings.warn(f"{module.name}:{line}: {name} has {size} lines", stacklevel=1)
    assert unexplained_catch_alls(module) == []


def test_the_rules_catch_what_they_are_for(tmp_path: pathlib.Path) -> None:
    """Each rule finds its violation in a made-up house: these tests can fail."""
    files = {
        "__init__.py": "",
        "cli.py": "from openshell_supervisor.proxy import tunnel",
        "errors.py": "from openshell_supervisor.policy import model",
        "policy/__init__.py": "",
        "policy/model.py": "import openshell_supervisor.proxy.tunnel",
        "policy/yaml_file.py": "from ..errors import Problem\nfrom .model import X\nfrom .. import verdict",
        "proxy/__init__.py": "",
        "proxy/tunnel.py": "from openshell_supervisor import verdict, boundary\nfrom ..policy.model import X",
        "boundary/__init__.py": "import mitmproxy.http",
        "verdict/__init__.py": "from openshell_supervisor.policy import yaml_file",
        "confine/__init__.py": "",
        "confine/launcher/__init__.py": "import os\nimport landlock",
        "confine/launcher/place.py": "from openshell_supervisor.confine.launcher import x\nimport openshell_supervisor.errors",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    modules = read(tmp_path)
    assert sorted(forbidden_arrows(modules)) == [
        "errors.py:1: errors may not import policy.model",
        "model.py:1: policy.model may not import proxy.tunnel",
        "tunnel.py:1: proxy.tunnel may not import boundary",
        "yaml_file.py:3: policy.yaml_file may not import verdict",
    ]
    assert strangers(modules) == [
        "boundary:1: mitmproxy belongs to proxy/",
        "confine.launcher:2: landlock is not in the standard library",
        "confine.launcher.place:2: openshell_supervisor is not in the standard library",
    ]


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("try:\n    x\nexcept Exception:\n    pass", True),
        ("try:\n    x\nexcept (OSError, BaseException):\n    pass", True),
        ("try:\n    x\nexcept:\n    pass", True),
        ("try:\n    x\nexcept Exception:  # noqa: BLE001\n    pass", True),
        ("try:\n    x\nexcept Exception:  # the task's boundary: logged, the connection ends\n    pass", False),
        ("try:\n    x\nexcept Exception:  # noqa: BLE001  the task's boundary: logged\n    pass", False),
        ("try:\n    x\nexcept BaseException:\n    undo()\n    raise", False),
        ("try:\n    x\n# the task's boundary\nexcept Exception:\n    pass", False),
        ("try:\n    x\nexcept OSError:\n    pass", False),
    ],
)
def test_a_catch_all_needs_its_reason(text: str, caught: bool) -> None:
    """A comment that only silences the linter is not a reason."""
    module = Module("m", pathlib.Path("m.py"), ast.parse(text), tuple(text.splitlines()))
    assert bool(unexplained_catch_alls(module)) is caught
