"""What a rule for a path covers on the real kernel: links, mounts, names that come and go; and how paths fail to open."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import pytest

import hosts
from openshell_supervisor.confine import landlock
from openshell_supervisor.errors import ConfineError

pytestmark = pytest.mark.skipif(landlock.support().abi == 0, reason="needs Landlock in the kernel")


@pytest.fixture
def zones(landlock_zones: Callable[..., pathlib.Path]) -> pathlib.Path:
    """The directories ro, rw and out, owned by who runs the tests."""
    return landlock_zones()


@pytest.fixture
def tried(landlock_try: Callable, landlock_rules: Callable, zones: pathlib.Path) -> Callable[..., list[str]]:
    """`tried((name, path below the zones), …, wrap=…)` under the usual rules, built at the time of the call."""

    def run(*tries: tuple[str, str], **options: object) -> list[str]:
        with landlock.build(landlock_rules(zones)) as ruleset:
            return list(landlock_try(ruleset, *((name, str(zones / path)) for name, path in tries), **options))

    return run


def test_a_symbolic_link_gives_no_way_around(tried: Callable, zones: pathlib.Path) -> None:
    """A link in an allowed place is worth what its target is worth, to read and to write."""
    (zones / "rw" / "to-out").symlink_to("../out/file")
    (zones / "rw" / "to-ro").symlink_to(zones / "ro")
    (zones / "out" / "to-rw").symlink_to("../rw/file")
    tries = [("read", "rw/to-out"), ("read", "rw/to-ro/file"), ("write", "rw/to-ro/file"), ("write", "out/to-rw")]
    assert tried(*tries) == ["EACCES", "ok", "EACCES", "ok"]


def test_a_rule_for_a_symbolic_link_holds_for_its_target(landlock_try: Callable, zones: pathlib.Path) -> None:
    """A path of the policy that is a link allows what it leads to, under the target's own name too, and not its neighbours."""
    (zones / "link").symlink_to("out/full")
    rules = landlock.Rules(("/usr", "/lib", "/lib64"), (str(zones / "link"),))
    with landlock.build(rules) as ruleset:
        seen = landlock_try(
            ruleset, *(("write", str(zones / path)) for path in ("link/moved", "out/full/moved", "out/file"))
        )
    assert seen == ["ok", "ok", "EACCES"]


def test_dot_dot_and_the_working_directory_give_no_way_around(tried: Callable) -> None:
    """`..` is resolved before the check; a process may stand in a directory that it may not read (Landlock allows chdir)."""
    tries = [("read", "ro/../out/file"), ("write", "out/../rw/file"), ("chdir", "out")]
    assert tried(*tries) == ["EACCES", "ok", "ok"]
    assert tried(("chdir", "out"), ("read", "out/../out/./file"), ("stat", "out/file")) == ["ok", "EACCES", "ok"]


def test_hard_links_and_moves_do_not_widen_rights(
    landlock_try: Callable, landlock_rules: Callable, zones: pathlib.Path
) -> None:
    """A file cannot be linked or moved from where it may only be read, or not even that, to where it could be written."""
    tries = [
        ("link", str(zones / "ro/file"), str(zones / "rw/l1")),
        ("link", str(zones / "out/file"), str(zones / "rw/l2")),
        ("move", str(zones / "out/victim"), str(zones / "rw/l3")),
        ("move", str(zones / "rw/victim"), str(zones / "out/l4")),
        ("link", str(zones / "rw/file"), str(zones / "rw/full/l5")),
        ("move", str(zones / "rw/victim"), str(zones / "rw/full/l6")),
    ]
    with landlock.build(landlock_rules(zones)) as ruleset:
        seen = landlock_try(ruleset, *tries)
    assert set(seen[:4]) <= {"EACCES", "EXDEV"}
    assert seen[4:] == ["ok", "ok"]


def test_a_file_and_its_neighbour(landlock_try: Callable, zones: pathlib.Path) -> None:
    """A rule for one file allows that file and neither its directory nor what lies beside it."""
    rules = landlock.Rules(("/usr", "/lib", "/lib64"), (str(zones / "out/file"),))
    with landlock.build(rules) as ruleset:
        tries = [("write", "file"), ("read", "victim"), ("list", "full"), ("make", "new")]
        seen = landlock_try(ruleset, *((name, str(zones / "out" / path)) for name, path in tries))
    assert seen == ["ok", "EACCES", "EACCES", "EACCES"]


@pytest.mark.root
def test_bind_mounts(tried: Callable, zones: pathlib.Path) -> None:
    """A rule goes with its directory to a second place, but not with a part of it; what is mounted inside is allowed there."""

    def mounted(source: str, target: str) -> list[str]:
        script = f'mount --bind "{zones / source}" "{zones / target}" && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, "sh"]

    whole, part = mounted("rw", "out/empty"), mounted("rw/full", "out/empty")
    assert tried(("write", "out/empty/full/moved"), ("write", "out/full/moved"), wrap=whole) == ["ok", "EACCES"]
    assert tried(("write", "out/empty/moved"), ("write", "rw/full/moved"), wrap=part) == ["EACCES", "ok"]
    inside = mounted("out/full", "ro/empty")
    tries = [("read", "ro/empty/moved"), ("write", "ro/empty/moved"), ("read", "out/full/moved")]
    assert tried(*tries, wrap=inside) == ["ok", "EACCES", "EACCES"]
    file = mounted("out/file", "rw/file")
    assert tried(("write", "rw/file"), ("read", "out/file"), wrap=file) == ["ok", "EACCES"]


def test_a_path_that_appears_later_is_not_covered(landlock_try: Callable, zones: pathlib.Path) -> None:
    """A missing path is left out and stays out when it appears; the rest holds, and a ruleset made anew covers it."""
    later = zones / "later"
    rules = landlock.Rules(("/usr", "/lib", "/lib64"), (str(later), str(zones / "rw")))
    tries = [("make", str(later / "new")), ("write", str(zones / "rw/file"))]
    with landlock.build(rules) as ruleset:
        assert ruleset.skipped == (landlock.Skipped(str(later), "path does not exist", errno.ENOENT, True),)
        later.mkdir()
        assert landlock_try(ruleset, *tries) == ["EACCES", "ok"]
    with landlock.build(rules) as ruleset:
        assert landlock_try(ruleset, *tries) == ["ok", "ok"]


def test_a_deleted_path_and_its_successor(
    landlock_try: Callable, landlock_rules: Callable, zones: pathlib.Path
) -> None:
    """A rule belongs to the object that was opened: moved away it keeps it, and what takes its name gets nothing."""
    with landlock.build(landlock_rules(zones)) as ruleset:
        (zones / "rw").rename(zones / "moved")
        (zones / "rw").mkdir()
        (zones / "ro" / "file").unlink()
        (zones / "ro" / "file").write_text("again")
        tries = [("write", "moved/file"), ("make", "rw/new"), ("read", "ro/file"), ("read", "out/file")]
        seen = landlock_try(ruleset, *((name, str(zones / path)) for name, path in tries))
    assert seen == ["ok", "EACCES", "ok", "EACCES"]


def test_devices_pipes_and_special_files(landlock_try: Callable, zones: pathlib.Path) -> None:
    """Rights are masked by what the path is, so a device or a FIFO has a rule like a file; a pipe's number is left out."""
    os.mkfifo(zones / "fifo")
    reader, writer = os.pipe()
    pipe = f"/proc/self/fd/{reader}"
    rules = landlock.Rules(
        ("/usr", "/lib", "/lib64", "/dev/zero", pipe), ("/dev/null", str(zones / "fifo")), hard=False
    )
    with landlock.build(rules) as ruleset:
        seen = landlock_try(
            ruleset, ("write", "/dev/null"), ("read", "/dev/zero"), ("write", "/dev/zero"), ("read", "/dev/full")
        )
        assert [(skipped.path, skipped.reason, skipped.missing) for skipped in ruleset.skipped] == [
            (pipe, "unexpected error", False)
        ]
    os.close(reader)
    os.close(writer)
    assert seen == ["ok", "ok", "EACCES", "EACCES"]


@pytest.mark.root
def test_a_rule_never_widens_file_modes(landlock_try: Callable, landlock_rules: Callable, zones: pathlib.Path) -> None:
    """A path that only root can open is allowed, because root opens it; a plain user still needs the modes to allow it."""
    (zones / "rw").chmod(0o700)
    (zones / "rw" / "file").chmod(0o644)
    path = str(zones / "rw/file")
    with landlock.build(landlock_rules(zones)) as ruleset:
        assert ruleset.skipped == ()
        assert landlock_try(ruleset, ("read", path), uid=hosts.THROWAWAY_UID) == ["EACCES"]
        (zones / "rw").chmod(0o711)
        assert landlock_try(ruleset, ("read", path), ("write", path), uid=hosts.THROWAWAY_UID) == ["ok", "EACCES"]


def test_five_hundred_rules(landlock_try: Callable, zones: pathlib.Path) -> None:
    """500 paths are one ruleset in less than 100 ms, and 20 in less than 5 ms; each of the 500 is allowed, and no 501st."""
    many = [zones / "many" / str(number) for number in range(501)]
    for path in many:
        path.mkdir(parents=True)
    landlock.build(landlock.Rules(("/usr",))).close()  # the package is imported
    assert _best_of_five(landlock.Rules((), tuple(map(str, many[:20])))) < 0.005
    rules = landlock.Rules(("/usr", "/lib", "/lib64"), tuple(map(str, many[:500])))
    assert _best_of_five(rules) < 0.1
    with landlock.build(rules) as ruleset:
        assert landlock_try(ruleset, *(("make", f"{path}/new") for path in many)) == [*["ok"] * 500, "EACCES"]


def _best_of_five(rules: landlock.Rules) -> float:
    def once() -> float:
        start = time.perf_counter()
        landlock.build(rules).close()
        return time.perf_counter() - start

    return min(once() for _ in range(5))


def _unopenable(zones: pathlib.Path) -> Iterator[tuple[str, str, int | None]]:
    """Paths that cannot be had: the path, the words of the reference, the errno."""
    (zones / "loop").symlink_to("loop")
    (zones / "dangling").symlink_to("nowhere")
    (zones / "root").symlink_to("/")
    yield str(zones / "absent"), "path does not exist", errno.ENOENT
    yield str(zones / "dangling"), "path does not exist", errno.ENOENT
    yield str(zones / "loop" / "x"), "too many symlink levels", errno.ELOOP
    yield "/" + "x" * 256, "path name too long", errno.ENAMETOOLONG
    yield str(zones / "rw" / "file" / "x"), "path component is not a directory", errno.ENOTDIR
    yield str(zones / "root"), "path is the root directory", None
    yield "relative", "path is not absolute", None
    yield "/nul\0", "open: embedded null character in path", None


def test_best_effort_leaves_a_path_out_and_keeps_the_rest(landlock_try: Callable, zones: pathlib.Path) -> None:
    """However a path fails, it is named with its reason and the others stay allowed; only a missing one keeps it `fully`."""
    cases = list(_unopenable(zones))
    rules = landlock.Rules(("/usr", "/lib", "/lib64"), (*(path for path, _, _ in cases), str(zones / "rw")))
    with landlock.build(rules) as ruleset:
        assert [(skipped.path, skipped.reason, skipped.errno) for skipped in ruleset.skipped] == cases
        assert [skipped.missing for skipped in ruleset.skipped] == [number == errno.ENOENT for _, _, number in cases]
        assert ruleset.applied == 4
        assert landlock_try(ruleset, ("write", str(zones / "rw/file")), ("read", str(zones / "out/file"))) == [
            "ok",
            "EACCES",
        ]
        word, sentence = landlock.summary(ruleset)
        assert word == "partly"
        assert "2 do not exist" in sentence
        assert "too many symlink levels" in sentence


def test_hard_requirement_names_the_path_and_leaks_nothing(zones: pathlib.Path) -> None:
    """However a path fails, `hard` makes it an error with path, reason and errno, and no descriptor stays open."""
    for path, reason, number in _unopenable(zones):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ConfineError) as caught:
            landlock.build(landlock.Rules(("/usr",), (path,), hard=True))
        assert os.listdir("/proc/self/fd") == before
        assert (caught.value.code, caught.value.errno) == ("landlock_path_unavailable", number)
        assert f"Landlock path unavailable in hard_requirement mode: {path} ({reason})" in str(caught.value)
    landlock.build(landlock.Rules(("/usr", "/dev/urandom"), ("/tmp", "/dev/null"), hard=True)).close()


@pytest.mark.parametrize("hard", [False, True])
def test_no_valid_path_is_an_error(hard: bool, zones: pathlib.Path) -> None:
    """A ruleset that would refuse every file is an error in both modes, and not a sandbox."""
    with pytest.raises(ConfineError) as caught:
        landlock.build(landlock.Rules((str(zones / "absent"),), hard=hard))
    assert caught.value.code == ("landlock_path_unavailable" if hard else "landlock_no_valid_paths")


@pytest.mark.root
def test_a_plain_user_leaves_out_what_it_may_not_open(zones: pathlib.Path, repo_root: pathlib.Path) -> None:
    """A supervisor without privileges names what it could not open, with "permission denied", and keeps the rest."""
    (zones / "out").chmod(0o700)
    program = (
        "import json; from openshell_supervisor.confine import landlock;"
        f"ruleset = landlock.build(landlock.Rules(('/usr',), ({str(zones / 'out' / 'file')!r},)));"
        "print(json.dumps([ruleset.applied, [(one.reason, one.errno, one.missing) for one in ruleset.skipped]]))"
    )
    done = hosts.run(hosts.unprivileged([sys.executable, "-c", program]))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, [["permission denied", errno.EACCES, False]]]
