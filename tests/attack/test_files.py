"""Directories and files that a workload may touch are turned against the supervisor that writes in them."""

from __future__ import annotations

import os
import pathlib
import sys

import arena
import product
import pytest

pytestmark = pytest.mark.root
POLICY = arena.POLICY.format(uid=arena.UID)


def test_a_run_directory_of_the_workloads_is_refused(open_tmp: pathlib.Path) -> None:
    """A base that the workload owns would let it swap the run's directory for a link: root would empty the link's target."""
    base, victim = open_tmp / "base", open_tmp / "victim"
    base.mkdir()
    os.chown(base, arena.UID, arena.UID)
    victim.mkdir()
    (victim / "precious").write_text("x")
    swap = f"cd {base} && for d in *; do mv $d gone && ln -s {victim} $d; done; echo STARTED"
    ran = product.run(["sh", "-c", swap], policy=POLICY, options=["--run-dir", str(base)])
    assert (victim / "precious").exists()
    assert "STARTED" not in ran.out
    assert ran.code == 2, ran.err


@pytest.mark.parametrize("above", ["owned", "writable"])
def test_a_run_directory_below_a_directory_of_the_workloads_is_refused(open_tmp: pathlib.Path, above: str) -> None:
    """It is enough to be able to rename a directory further up."""
    upper = open_tmp / "upper"
    (upper / "base").mkdir(parents=True)
    if above == "owned":
        os.chown(upper, arena.UID, arena.UID)
    else:
        upper.chmod(0o777)
    ran = product.run(["echo", "STARTED"], policy=POLICY, options=["--run-dir", str(upper / "base")])
    assert "STARTED" not in ran.out
    assert ran.code == 2, ran.err


@pytest.mark.parametrize("name", ["sandbox-project", "openshell-run-mine", "sandbox-0a1b2c3d"])
def test_the_sweep_spares_what_is_not_ours(open_tmp: pathlib.Path, name: str) -> None:
    """A directory that only looks like one of ours keeps its files, however old it is."""
    (open_tmp / name).mkdir()
    (open_tmp / name / "thesis.txt").write_text("precious")
    for path in (open_tmp / name / "thesis.txt", open_tmp / name):
        os.utime(path, (1, 1))
    ran = product.run(["true"], policy=POLICY, options=["--run-dir", str(open_tmp)])
    assert ran.code == 0, ran.err
    assert (open_tmp / name / "thesis.txt").read_text() == "precious"


def test_the_workload_cannot_change_the_trust_files() -> None:
    """As another user it can read the certificate and the bundle, and neither write, replace nor remove them."""
    code = (
        "import os; f = os.environ['SSL_CERT_FILE']; d = os.path.dirname(f); os.stat(f)\n"
        "def tries(work):\n"
        "    try: work(); print('opened')\n"
        "    except OSError as error: print(error.errno)\n"
        "tries(lambda: open(f, 'a')); tries(lambda: os.unlink(f)); tries(lambda: os.rename(f, f + 'x'))\n"
        "tries(lambda: open(d + '/new', 'w')); tries(lambda: os.rename(d, d + 'x')); tries(lambda: os.chmod(f, 0o666))\n"
        "print(len(open(f).read()) > 1000)"
    )
    ran = product.run([sys.executable, "-I", "-c", code], policy=POLICY)
    *answers, readable = ran.out.split()
    assert readable == "True", ran.err
    assert len(answers) == 6
    assert "opened" not in answers


def test_events_are_not_the_workloads_to_read_or_write(open_tmp: pathlib.Path) -> None:
    """The JSONL file is the supervisor's own (0600): the workload can neither read nor append to it, and cannot lie in it."""
    open_tmp.chmod(0o755)
    events = open_tmp / "events.jsonl"
    code = f"for m in 'r', 'a', 'w':\n try: open({str(events)!r}, m); print('opened')\n except OSError as e: print(e.errno)"
    ran = product.run([sys.executable, "-I", "-c", code], policy=POLICY, options=["--ocsf-file", str(events)])
    assert ran.out.split() == ["13", "13", "13"], ran.err


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_closed_standard_descriptors_are_not_filled_with_ours(closed: tuple[int, ...], open_tmp: pathlib.Path) -> None:
    """Started without stdin, stdout or stderr, the workload finds nothing of the supervisor's in their place."""
    open_tmp.chmod(0o777)
    found = open_tmp / "found"
    code = (
        "import os, stat\n"
        "for n in range(3):\n"
        "    try: s = os.fstat(n); print(n, 'socket' if stat.S_ISSOCK(s.st_mode) else os.readlink(f'/proc/self/fd/{n}'))\n"
        "    except OSError: print(n, 'closed')"
    )
    shell = " ".join(f"{n}{'<' if n == 0 else '>'}&-" for n in closed)
    command = ["sh", "-c", f'exec 9>{found}; exec "$0" -I -c "$1" >&9', sys.executable, code]
    ran = product.run(command, policy=POLICY, wrap=lambda argv: ["sh", "-c", f'exec "$@" {shell}', "sh", *argv])
    assert ran.code == 0, ran.err
    lines = dict(line.split(" ", 1) for line in found.read_text().splitlines())
    for number in closed:
        if number != 1:  # taken by the test itself
            assert lines[str(number)] in ("closed", "/dev/null"), lines
