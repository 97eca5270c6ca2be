"""Binary identity in the product: who may use an endpoint, on each kind of host, and those who would like to be somebody else."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import product
import pytest
from connections import python

import hosts

Wrap = Callable[[list[str]], list[str]] | None
# From the strongest host to the poorest: each tells whose a connection is.
PLACES = [
    pytest.param(None, "veth", "sock_diag", id="root", marks=pytest.mark.root),
    pytest.param(lambda argv: hosts.without_caps(argv, "sys_ptrace"), "veth", "sock_diag", id="root without SYS_PTRACE",
                 marks=pytest.mark.root),
    pytest.param(lambda argv: hosts.without_caps(argv), "loopback", "sock_diag", id="root without capabilities",
                 marks=pytest.mark.root),
    pytest.param(hosts.unprivileged, "loopback", "sock_diag", id="plain user"),
    pytest.param(lambda argv: hosts.outer_seccomp(hosts.unprivileged(argv), "socket=16"), "loopback", "/proc/net/tcp",
                 id="plain user without netlink"),
]  # fmt: skip
# Says CONNECT and prints the status and the reason that the proxy gives; then waits, where it is told to.
ASK = """
import json, os, socket, sys
host, _, port = os.environ["HTTP_PROXY"].removeprefix("http://").partition(":")
def connect():
    return socket.create_connection((host, int(port)), 10)
def ask(s):
    s.settimeout(20)
    s.sendall(b"CONNECT up.test:%d HTTP/1.1\\r\\nHost: up.test\\r\\n\\r\\n" % PORT)
    return hear(s)
def hear(s):
    said = s.recv(65536).decode()
    while "\\r\\n\\r\\n" in said and "403" in said[:15] and not said.rstrip().endswith("}"):
        said += s.recv(65536).decode()
    body = said.partition("\\r\\n\\r\\n")[2]
    answer = [said[9:12], json.loads(body).get("reason_id") if body.startswith("{") else ""]
    os.write(1, (json.dumps(answer) + "\\n").encode())  # whole, where threads and processes share the pipe
"""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of an upstream on this machine that accepts and keeps what it has until the end."""
    with socket.create_server(("127.0.0.1", 0), backlog=32) as listener:
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    kept.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield int(listener.getsockname()[1])


def run(
    code: str,
    port: int,
    binaries: Sequence[str],
    *,
    program: str | None = None,
    wrap: Wrap = None,
    user: str = "",
    **more: str,
) -> product.Ran:
    """`code` (with `ask` and `connect`) run by `program`, under a policy that lets `binaries` reach the upstream."""
    listed = "".join(f"    - path: {json.dumps(path)}\n" for path in binaries)
    policy = (
        f"version: 1\n{f'process: {{run_as_user: {user!r}, run_as_group: {user!r}}}' if user else ''}\n"
        "network_policies:\n  a:\n    endpoints:\n"
        f"    - {{host: up.test, port: {port}}}\n    binaries:\n{listed}"
    )
    text = f"PORT = {port}\n{ASK}{code}"
    interpreter = program or sys.executable
    home = {"PYTHONHOME": sys.base_prefix, "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"} if program else {}
    command = ["env", *(f"{key}={value}" for key, value in home.items()), interpreter, "-c", text]
    options = ["--network-mode", "isolated", "--resolve", "up.test=127.0.0.1"]
    return product.run(command, policy=policy, options=options, wrap=wrap, env=more)


def said(ran: product.Ran) -> list[list[str]]:
    """What the proxy answered: status and reason id of each question."""
    assert ran.out, ran.err
    return [json.loads(line) for line in ran.out.splitlines()]


@pytest.mark.parametrize(("wrap", "rung", "table"), PLACES)
def test_only_the_listed_program(open_tmp: pathlib.Path, port: int, wrap: Wrap, rung: str, table: str) -> None:
    """Of two copies of one program the listed one is let through and the other is not; both are in the events by name."""
    listed, other = python(open_tmp, "listed"), python(open_tmp, "other")
    good = run("ask(connect())", port, [listed], program=listed, wrap=wrap)
    assert said(good) == [["200", ""]], good.err
    assert good.rung == rung
    layer = good.layer("binary_identity")
    assert (layer["state"], layer["detail"]["table"]) == ("enforced", table), layer
    assert f"ALLOWED {listed}(" in "".join(good.lines("NET:OPEN"))
    bad = run("ask(connect())", port, [listed], program=other, wrap=wrap)
    assert said(bad) == [["403", "binary_not_allowed"]], bad.err
    assert f"DENIED {other}(" in "".join(bad.lines("NET:OPEN"))


def test_an_ancestor_allows(open_tmp: pathlib.Path, port: int) -> None:
    """A program that a listed one starts may do what that one may; where neither is listed it may not."""
    above, below = python(open_tmp, "above"), python(open_tmp, "below")
    base = "sys.orig_argv[2].split('#cut')[0] + 'ask(connect())'"
    code = f"import subprocess, sys\nsubprocess.run([{below!r}, '-c', {base}])\n"
    for listed in (above, below):
        assert said(run(f"#cut\n{code}", port, [listed], program=above)) == [["200", ""]]
    assert said(run(f"#cut\n{code}", port, ["/usr/bin/git"], program=above)) == [["403", "binary_not_allowed"]]


def test_a_listed_link_stands_for_its_file(open_tmp: pathlib.Path, port: int) -> None:
    """What runs is the file behind a link (/usr/bin/python3, say): listing the link allows it, another link does not."""
    program, other = python(open_tmp, "tool-1.2"), python(open_tmp, "other")
    for name, target in (("tool", program), ("wrong", other)):
        (open_tmp / name).symlink_to(target)
    assert said(run("ask(connect())", port, [str(open_tmp / "tool")], program=program)) == [["200", ""]]
    assert said(run("ask(connect())", port, [str(open_tmp / "wrong")], program=program)) == [
        ["403", "binary_not_allowed"]
    ]


def test_a_connection_shared_with_a_listed_program_is_refused(open_tmp: pathlib.Path, port: int) -> None:
    """The unlisted program connects and hands the socket to the listed one, keeping it: ambiguous. Alone, each is what it is."""
    listed, other = python(open_tmp, "listed"), python(open_tmp, "other")
    code = (
        "import subprocess\ns = connect()\ns.set_inheritable(True)\n"
        f"p = subprocess.Popen([{listed!r}, '-c', 'print(1, flush=True); import sys; sys.stdin.read()'], close_fds=False,"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE)\np.stdout.read(1)\nask(s)\np.kill()\np.wait()\n"
    )
    assert said(run(code, port, [listed], program=other)) == [["403", "caller_ambiguous"]]
    assert said(run(code, port, [listed, other], program=other)) == [["403", "caller_ambiguous"]]
    assert said(run("ask(connect())", port, [listed, other], program=other)) == [["200", ""]]


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        pytest.param(None, "caller_ambiguous", id="root", marks=pytest.mark.root),
        pytest.param(hosts.unprivileged, "caller_unreadable", id="plain user"),
    ],
)
def test_a_holder_that_hides(open_tmp: pathlib.Path, port: int, wrap: Wrap, reason: str) -> None:
    """prctl(2), PR_SET_DUMPABLE 0: a program that hides its descriptors and leaves its socket to the listed one is refused. An
    agent for keys, which hides as well and holds nothing, keeps nobody from anything."""
    listed, other = python(open_tmp, "listed"), python(open_tmp, "other")
    hide = "import ctypes\nctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n"
    child = "print(1, flush=True)\nimport sys\nsys.stdin.read()\n"
    pipes = "stdin=subprocess.PIPE, stdout=subprocess.PIPE)\np.stdout.read(1)\n"
    sharing = f"import subprocess\ns = connect()\ns.set_inheritable(True)\np = subprocess.Popen([{listed!r}, '-c', {child!r}],"
    sharing += f" close_fds=False, {pipes}{hide}ask(s)\np.kill()\np.wait()\n"
    assert said(run(sharing, port, [listed], program=other, wrap=wrap)) == [["403", reason]]
    base = "sys.orig_argv[2].split('#cut')[0] + 'ask(connect())'"
    agent = f"import subprocess, sys\np = subprocess.Popen([{other!r}, '-c', {hide + child!r}], {pipes}"
    agent += f"subprocess.run([{listed!r}, '-c', {base}])\np.kill()\np.wait()\n"
    assert said(run(f"#cut\n{agent}", port, [listed], program=other, wrap=wrap)) == [["200", ""]]


@pytest.mark.parametrize(
    "name", [b"a\xffb", b"a\nb OCSF NET:OPEN", b"a\x1b[2Jb"], ids=["no UTF-8", "line end", "terminal"]
)
def test_names_made_to_confuse_the_records(open_tmp: pathlib.Path, port: int, name: bytes) -> None:
    """A program's path is the workload's text: whatever is in it, the answer is a refusal, each event stays one line, and the
    supervisor goes on."""
    program = os.fsdecode(os.fsencode(open_tmp) + b"/" + name)
    os.rename(python(open_tmp, "odd"), program)
    ran = run("ask(connect())\nask(connect())\n", port, ["/usr/bin/git"], program=program)
    assert [status for status, _ in said(ran)] == ["403", "403"]
    assert ran.code == 0 and len(ran.lines("NET:OPEN")) == 2 and "\x1b" not in ran.err


def test_names_that_a_program_gives_itself_count_for_nothing(open_tmp: pathlib.Path, port: int) -> None:
    """argv[0] and the process's name: the kernel's word on the executable counts, nothing else."""
    listed, other = python(open_tmp, "listed"), python(open_tmp, "other")
    code = "import ctypes\nctypes.CDLL(None).prctl(15, b'listed', 0, 0, 0)\nask(connect())\n"
    base = f"sys.orig_argv[2].split('#cut')[0] + {code!r}"
    as_listed = f"#cut\nimport os, sys\nos.execv({other!r}, [{listed!r}, '-c', {base}])\n"
    assert said(run(as_listed, port, [listed], program=other)) == [["403", "binary_not_allowed"]]
    as_other = f"#cut\nimport os, sys\nos.execv({listed!r}, [{other!r}, '-c', {base}])\n"
    assert said(run(as_other, port, [listed], program=other)) == [["200", ""]]


def test_a_replaced_program_is_refused(open_tmp: pathlib.Path, port: int) -> None:
    """The workload may write where its listed program is: the first content is trusted, another one is not."""
    place = open_tmp / "bin"
    place.mkdir()
    listed = python(place, "listed")
    for path in (place, pathlib.Path(listed)):
        os.chmod(path, 0o777)
    child = "import subprocess, sys\nbase = sys.orig_argv[2].split('#cut')[0] + 'ask(connect())'\n"
    child += f"go = lambda: subprocess.run([{listed!r}, '-c', base])\n"
    code = f"#cut\n{child}go()\nimport os\ndata = open({listed!r}, 'rb').read()\nos.unlink({listed!r})\n"
    code += f"open({listed!r}, 'wb').write(data + b'0')\nos.chmod({listed!r}, 0o755)\ngo()\n"
    other = python(open_tmp, "other")
    assert said(run(code, port, [listed], program=other)) == [["200", ""], ["403", "binary_changed"]]


def test_identity_can_be_turned_off_and_that_is_said(open_tmp: pathlib.Path, port: int) -> None:
    """OPENSHELL_NETWORK_BINARY_IDENTITY=relaxed: any program passes, and the statement says `off` and why. Unset, it does not."""
    other = python(open_tmp, "other")
    free = run("ask(connect())", port, ["/usr/bin/git"], program=other, OPENSHELL_NETWORK_BINARY_IDENTITY="relaxed")
    assert said(free) == [["200", ""]]
    layer = free.layer("binary_identity")
    assert layer["state"] == "off" and "every program counts as allowed" in layer["reason"]
    assert said(run("ask(connect())", port, ["/usr/bin/git"], program=other)) == [["403", "binary_not_allowed"]]


@pytest.mark.root
def test_where_nobody_can_be_told_apart_that_is_said_and_can_be_demanded(port: int) -> None:
    """Without CAP_SYS_PTRACE and user namespaces another user's descriptors are closed to the supervisor: `degraded`, with
    the reason, and every program passes; with --require binary_identity there is no start. With user namespaces it holds."""
    rich: Wrap = lambda argv: hosts.without_caps(argv, "sys_ptrace")  # noqa: E731
    poor: Wrap = lambda argv: hosts.without_caps(hosts.outer_seccomp(argv, "unshare:NEWUSER"), "sys_ptrace")  # noqa: E731
    user = str(hosts.THROWAWAY_UID)
    free = run("ask(connect())", port, ["/usr/bin/git"], wrap=poor, user=user)
    layer = free.layer("binary_identity")
    assert layer["state"] == "degraded" and "every program counts as allowed" in layer["reason"], layer
    assert said(free) == [["200", ""]]
    refused = run("ask(connect())", port, ["/usr/bin/git"], wrap=poor, user=user, OPENSHELL_REQUIRE="binary_identity")
    assert refused.code != 0 and refused.out == "" and "binary_identity" in refused.err
    held = run("ask(connect())", port, ["/usr/bin/git"], wrap=rich, user=user, OPENSHELL_REQUIRE="binary_identity")
    assert said(held) == [["403", "binary_not_allowed"]]


def test_many_connections_at_once_are_told_apart(open_tmp: pathlib.Path, port: int) -> None:
    """Thirty connections of two programs at the same time: each answer is its own program's."""
    listed, other = python(open_tmp, "listed"), python(open_tmp, "other")
    child = "import threading\nts = [threading.Thread(target=lambda: ask(connect())) for _ in range(15)]\n"
    child += "[t.start() for t in ts]\n[t.join() for t in ts]\n"
    code = f"#cut\nimport subprocess, sys\nbase = sys.orig_argv[2].split('#cut')[0] + {child!r}\n"
    code += f"ps = [subprocess.Popen([p, '-c', base]) for p in ({listed!r}, {other!r})]\n[p.wait() for p in ps]\n"
    third = python(open_tmp, "third")
    answers = sorted(said(run(code, port, [listed], program=third)))
    assert answers == [["200", ""]] * 15 + [["403", "binary_not_allowed"]] * 15
