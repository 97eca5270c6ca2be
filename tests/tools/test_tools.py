"""A developer's tools in a workspace, under the whole confinement: what works, and what is refused so that it can be read."""

from __future__ import annotations

import pathlib
import re
import shutil
import sys
from collections.abc import Callable

import pytest
import toolbox
import workshop

import hosts

World = Callable[[str], workshop.Lived]
LAYERS = ("filesystem", "syscalls", "privileges")


def rows(tools: tuple[toolbox.Tool, ...]) -> list[object]:
    """A test for each row in each of its worlds, the worlds one after the other."""
    return [
        pytest.param(place, tool, id=f"{place}: {tool.name}")
        for place in workshop.WORLDS
        for tool in tools
        if place in tool.worlds
    ]


def read(world: World, place: str, tool: toolbox.Tool) -> str:
    """The row's output, after the checks that hold for every row; skips where the machine lacks something."""
    lacking = workshop.missing(tool, place)
    if lacking:
        pytest.skip(lacking)
    lived = world(place)
    assert tool.name in lived.rows, f"the row did not run: exit {lived.code}\n{lived.err}"
    code, text = lived.rows[tool.name]
    absent = [pattern for pattern in tool.shows if not re.search(pattern, text)]
    assert not absent, f"does not show {absent}, exit {code}:\n{text}"
    assert code == 0, f"exit {code}:\n{text}"
    return text


@pytest.mark.parametrize(("place", "tool"), rows(toolbox.WORKS))
def test_a_tool_works(world: World, place: str, tool: toolbox.Tool) -> None:
    """Typed in the workspace, it ends well and its output shows what it did."""
    read(world, place, tool)


@pytest.mark.parametrize(("place", "tool"), rows(toolbox.REFUSED))
def test_what_is_refused_says_so(world: World, place: str, tool: toolbox.Tool) -> None:
    """The refusal is an error that the tool can name, not a hang or a kill; beside it, what is not refused works."""
    read(world, place, tool)


@pytest.mark.parametrize("place", workshop.WORLDS)
def test_the_tools_ran_confined(world: World, place: str) -> None:
    """The statement of the very run whose rows are checked above: files, system calls and privileges, all enforced and probed."""
    if workshop.WORLDS[place].root and hosts.missing_for_root_tests():
        pytest.skip(hosts.missing_for_root_tests())
    lived = world(place)
    layers = {layer["layer"]: layer for layer in lived.statement["layers"]}
    assert {name: layers[name]["state"] for name in LAYERS} == dict.fromkeys(LAYERS, "enforced"), lived.err
    assert all(layers[name]["detail"]["probed"] for name in LAYERS)
    assert lived.code == 0, lived.err


def test_what_is_outside_of_the_rules_is_anybodys_without_them(outside: pathlib.Path) -> None:
    """The rows that show a file and a program refused would show them allowed, were it not for the file rules."""
    line = ["sh", "-c", f"cat {outside}/file && {outside}/program && echo > {outside}/new && echo all allowed"]
    done = hosts.run(hosts.unprivileged(line))
    assert done.stdout.split() == ["text", "all", "allowed"], done.stderr


@pytest.mark.skipif(shutil.which("node", path=workshop.PATH) is None, reason="needs the client program node")
def test_a_runtime_sees_the_memory_that_it_has() -> None:
    """A runtime inside reads the same limit of its cgroup as outside; one that reads none takes the host's memory for its own."""
    product = [sys.executable, "-m", "openshell_supervisor", "run", "--log-level", "error", "--"]
    inside = workshop.constrained_memory(hosts.unprivileged(product))
    assert inside == workshop.constrained_memory(hosts.unprivileged([]))
