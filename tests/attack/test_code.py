"""A workload of its supervisor's own user tries to become its supervisor: by rewriting code that is imported later."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import arena
import pytest

import hosts

pytestmark = pytest.mark.root
# Imported only once the workload runs; `{port}` is a witness outside.
PAYLOAD = "import socket as _s\n_s.create_connection(('127.0.0.1', {port}), 2).sendall(b'OWNED')\n"
ATTACKER = (
    """
import os, pathlib, shutil, socket, sys, time
home, port, how = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
payload = {payload!r}.format(port=port)
os.chdir("/")
def poison(root, in_place=False):
    for path in root.rglob("*.py"):
        head, mark, rest = path.read_text().partition("from __future__ import annotations")
        if not mark:
            head, rest = "", head
        if in_place:
            path.write_text(head + mark + chr(10) + payload + rest)
            continue
        new = path.with_suffix(".new")
        new.write_text(head + mark + chr(10) + payload + rest)
        new.replace(path)
def attack():
    tree = home / "project" / "tree"
    if how == "rewrite":
        poison(tree / "openshell_supervisor")
    elif how == "replace":
        tree.rename(home / "project" / "was")
        (home / "prepared").rename(tree)
    elif how == "parent":
        (home / "project").rename(home / "was")
        (home / "project").mkdir()
        (home / "prepared").rename(tree)
    elif how == "hard link":
        poison(home / "cache", in_place=True)
    elif how == "home":
        home.rename(home.parent / "gone")
        (home / "project").mkdir(parents=True)
        (home.parent / "gone" / "prepared").rename(tree)
    elif how == "nested":
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        uid, gid = os.getuid(), os.getgid()
        if libc.unshare(0x10000000 | 0x20000):
            raise OSError(ctypes.get_errno(), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {{uid}} 1"), ("gid_map", f"0 {{gid}} 1")):
            pathlib.Path("/proc/self", name).write_text(text)
        inner = str(tree / "openshell_supervisor").encode()
        aside = home / "aside"
        aside.mkdir()
        tries = [
            libc.umount2(inner, 2),
            libc.mount(None, inner, None, ctypes.c_ulong(32 | 4096), None),
            libc.mount(str(home / "project").encode(), str(aside).encode(), None, ctypes.c_ulong(4096), None),
        ]
        print("won", tries, flush=True) if tries[:2] != [-1, -1] else None
        for root in (tree, aside / "tree"):
            if root.exists():
                poison(root / "openshell_supervisor")
try:
    attack()
except OSError as error:
    print(error, flush=True)
with socket.create_connection(("127.0.0.1", 3128), 5) as sock:
    sock.sendall(b"GET http://denied.test/ HTTP/1.1" + b"\\r\\nHost: denied.test" + b"\\r\\n\\r\\n")
    print("proxy", sock.recv(12), flush=True)
time.sleep(3)  # the warm-up of the proxy, on a loaded machine
""".replace("{payload!r}", repr(PAYLOAD))
    .replace("{{", "{")
    .replace("}}", "}")
)


@pytest.fixture
def home(open_tmp: pathlib.Path, repo_root: pathlib.Path) -> Iterator[pathlib.Path]:
    """A home of the attacker's, with the product's source in it, as after `git clone; make setup` by a plain user."""
    open_tmp.chmod(0o1777)  # as /tmp is: the owner of what lies in it may rename that, others may not
    place = open_tmp / "home"
    tree = place / "project" / "tree"
    tree.mkdir(parents=True)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(
        repo_root / "src" / "openshell_supervisor", tree / "openshell_supervisor", ignore=skip, dirs_exist_ok=True
    )
    # As uv installs: the files of an environment are hard links into the user's cache.
    for path in tree.rglob("*.py"):
        linked = place / "cache" / path.relative_to(tree)
        linked.parent.mkdir(parents=True, exist_ok=True)
        linked.hardlink_to(path)
    for path in [place, *place.rglob("*")]:
        os.chown(path, arena.UID, arena.UID)
    (open_tmp / "attacker.py").write_text(textwrap.dedent(ATTACKER))
    yield place


def prepare(home: pathlib.Path, port: str) -> None:
    """The attacker's own copy of the tree, ready to be moved in: with it the attack is two renames, faster than any import."""
    prepared = home / "prepared"
    shutil.copytree(home / "project" / "tree", prepared)
    for path in prepared.rglob("*.py"):
        head, mark, rest = path.read_text().partition("from __future__ import annotations")
        path.write_text((head + mark if mark else "") + "\n" + PAYLOAD.format(port=port) + (rest if mark else head))
    for path in [prepared, *prepared.rglob("*")]:
        os.chown(path, arena.UID, arena.UID)


def owned(home: pathlib.Path, how: str) -> tuple[str | None, str, str]:
    """(what the witness heard or None, the attacker's output, the supervisor's stderr) of one attack."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(home / "project" / "tree")}
    with socket.create_server(("127.0.0.1", 0)) as witness:
        witness.settimeout(0.5)
        port = str(witness.getsockname()[1])
        prepare(home, port)
        attacker = [sys.executable, "-I", str(home.parent / "attacker.py"), str(home), port, how]
        product = [sys.executable, "-m", "openshell_supervisor", "run", "--network-mode", "isolated"]
        # The network's own defence is what is tried here; file rules would be a second one.
        product += ["--declare-external", "filesystem,syscalls", "--", *attacker]
        argv = hosts.unprivileged(product, uid=arena.UID, home=home)
        done = subprocess.run(
            argv, cwd="/", env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        try:
            client, _ = witness.accept()
        except TimeoutError:
            return None, done.stdout, done.stderr
        with client:
            return client.recv(16).decode(), done.stdout, done.stderr


@pytest.mark.parametrize(
    "how",
    [
        "rewrite",
        "replace",
        "parent",
        "home",
        "hard link",
        "nested",
    ],
)
def test_code_that_is_imported_later_is_out_of_reach(home: pathlib.Path, how: str) -> None:
    """Rewriting, replacing, or unmounting on the way to the supervisor's code runs nothing outside, and the proxy lives."""
    heard, out, err = owned(home, how)
    assert "proxy" in out, err
    assert "network:enforced" in err, "where it cannot be held, the statement must not promise it"
    assert heard is None
    assert "won" not in out
