"""HOME and PATH under file rules: an unusable home is replaced by an empty one, and what cannot be run is looked for last."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys

import pytest
import workshop

import hosts

PRODUCT = [sys.executable, "-m", "openshell_supervisor", "run", "--log-level", "error"]


def typed(script: str, home: str, *options: str, path: str = workshop.PATH) -> list[str]:
    """The output's lines of a script that a plain user with this HOME runs in the product."""
    line = hosts.unprivileged(["env", f"PATH={path}", *PRODUCT, *options, "--", "bash", "-c", script], home=home)
    done = hosts.run(line)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def distant(outside: pathlib.Path) -> pathlib.Path:
    """A home beyond the file rules, with a configuration of git's that its user could read without them."""
    home = outside / "home"
    home.mkdir(exist_ok=True)
    (home / ".gitconfig").write_text("[user]\n\tname = distant\n")
    home.chmod(0o777)
    return home


@pytest.mark.skipif(shutil.which("git", path=workshop.PATH) is None, reason="needs the client program git")
def test_a_home_that_the_rules_close_is_replaced(distant: pathlib.Path) -> None:
    """git, which ends at a configuration that it may not read, works; the home is the workload's own, and gone afterwards."""
    mine = "git init -q $HOME/repository && stat -c '%a %u' $HOME && id -u && echo $HOME"
    mode, own, home = typed(mine, str(distant))
    assert mode == f"700 {own}"
    assert home != str(distant)
    assert not os.path.exists(home)


def test_a_home_within_the_rules_stays(unprivileged_home: pathlib.Path) -> None:
    """A home that the workload can use is left as it is, with what is in it."""
    assert typed("touch $HOME/kept && echo $HOME", str(unprivileged_home)) == [str(unprivileged_home)]
    assert (unprivileged_home / "kept").exists()


@pytest.mark.parametrize("home", ["/tmp", "/nonexistent"])
def test_everybodys_home_and_nobodys_are_none(home: str) -> None:
    """Who has no home does not share /tmp's dot files with every other user of the machine."""
    (given,) = typed("touch $HOME/.configuration && echo $HOME", home)
    assert given.startswith("/tmp/openshell-home-")


def test_programs_that_may_be_run_are_found_first(outside: pathlib.Path, unprivileged_home: pathlib.Path) -> None:
    """bash ends at the first program of a name, even if it may not run it: what lies outside of the rules is looked for last."""
    programs = outside / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("ls", "only-there"):
        shutil.copy("/bin/true", programs / name)
    script = "ls -d /usr; only-there; echo $?"
    assert typed(script, str(unprivileged_home), path=f"{programs}:{workshop.PATH}") == ["/usr", "126"]
