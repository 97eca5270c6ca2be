"""Who is on the other end: real programs that call a real listener, and those that would like to be taken for others."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest
from connections import CALL, WAIT, python, table, world

from openshell_supervisor.callers import programs
from openshell_supervisor.callers.caller import Caller
from openshell_supervisor.callers.lookup import Callers

CALLING = CALL + WAIT
SHELL = os.path.realpath("/bin/sh")


def digest(path: str) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("proc", [False, True], ids=["sock_diag", "proc"])
def test_a_caller_is_named_by_its_program(open_tmp: pathlib.Path, proc: bool) -> None:
    """The program's own path and hash, whatever its argv[0] says; two programs are told apart."""
    with world(proc=proc) as here:
        for name in ("one", "two"):
            program = python(open_tmp, name)
            caller = here.call("/usr/bin/trusted", "-c", CALLING, executable=program)
            assert caller == Caller(program, (), ("/usr/bin/trusted",), digest(program), pid=here.started[-1].pid)


@pytest.mark.parametrize("proc", [False, True], ids=["sock_diag", "proc"])
@pytest.mark.parametrize("dual", [False, True], ids=["IPv6", "IPv4 to a dual listener"])
def test_both_families(open_tmp: pathlib.Path, proc: bool, dual: bool) -> None:
    """IPv6, and IPv4 as an IPv6 listener sees it (::ffff:a.b.c.d), lead to the same program."""
    program = python(open_tmp, "six")
    with world(socket.AF_INET6, proc=proc, dual=dual) as here:
        here.start([program, "-c", CALLING.replace("sys.argv[1]", "'127.0.0.1'" if dual else "'::1'")])
        assert here.who(here.accept()).binary == program


def test_ancestors_up_to_the_first_process(open_tmp: pathlib.Path) -> None:
    """A shell that starts a program is its ancestor; this test's process, which is the supervisor here, is none."""
    program = python(open_tmp, "child")
    script = open_tmp / "start.sh"
    script.write_text(f'#!{SHELL}\n{program} -c "$CODE" "$@"; exit 0\n')
    script.chmod(0o755)
    with world() as here:
        os.environ["CODE"] = CALLING
        try:
            caller = here.call(str(script))
        finally:
            del os.environ["CODE"]
        assert (caller.binary, caller.ancestors) == (program, (SHELL,))
        # The kernel runs a script's interpreter: the script is only a path in its arguments.
        assert str(script) in caller.cmdline


def test_a_connection_that_is_gone_is_nobodys(open_tmp: pathlib.Path) -> None:
    """After the program's end its connection says nothing; before it, it does."""
    program = python(open_tmp, "short")
    with world() as here:
        process = here.start([program, "-c", CALLING])
        connection = here.accept()
        assert here.who(connection).binary == program
        process.kill()
        process.wait()
        assert here.who(connection).problem_id == "caller_unknown"


def test_a_listener_is_not_taken_for_a_caller() -> None:
    """Asked for a connection that does not exist, the kernel answers with a listener on that port; that is refused."""
    with world() as here, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        caller = here.identifier.identify(other.getsockname(), here.address)
        assert (caller.binary, caller.problem_id) == ("", "caller_unknown")


def test_a_socket_that_two_programs_hold_is_ambiguous(open_tmp: pathlib.Path) -> None:
    """An inherited socket: while the other program holds it too the caller is unknown; alone again it is known."""
    one, two = python(open_tmp, "one"), python(open_tmp, "two")
    code = (
        CALL.replace("s.sendall", "import os,subprocess\ns.set_inheritable(True)\n"
        f"p=subprocess.Popen([{two!r},'-c','import sys;sys.stdout.write(\"x\");sys.stdout.flush();sys.stdin.read()'],"
        "stdin=subprocess.PIPE,stdout=subprocess.PIPE,close_fds=False)\np.stdout.read(1)\ns.sendall")
        + "sys.stdin.readline()\np.kill();p.wait()\ns.sendall(b'again')\nsys.stdin.read()\n"
    )  # fmt: skip
    with world() as here:
        process = here.start([one, "-c", code])
        connection = here.accept()
        caller = here.who(connection)
        assert (caller.binary, caller.problem_id) == ("", "caller_ambiguous")
        assert "is held by PIDs [" in caller.problem
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert connection.recv(5) == b"again"
        assert here.who(connection).binary == one


def test_a_socket_passed_to_another_program_is_that_ones(open_tmp: pathlib.Path) -> None:
    """Handed over (inherited through exec), the connection is the new program's, not the one's that made it."""
    one, two = python(open_tmp, "one"), python(open_tmp, "two")
    code = CALL.replace("s.sendall(b'hello')", "import os\ns.set_inheritable(True)\n"
                        f"os.execv({two!r},[{two!r},'-c',\"import socket,sys;s=socket.socket(fileno=int(sys.argv[1]));"
                        "s.sendall(b'hello');sys.stdin.read()\",str(s.fileno())])")  # fmt: skip
    with world() as here:
        assert here.call(one, "-c", code).binary == two


def test_forked_workers_of_one_program_are_one_caller(open_tmp: pathlib.Path) -> None:
    """A fork that still has the parent's socket runs the same program: known, with the ancestors that both have."""
    program = python(open_tmp, "forks")
    code = CALL.replace("s.sendall", "import os,time\nif not os.fork(): time.sleep(60)\ns.sendall") + WAIT
    with world() as here:
        try:
            caller = here.call(program, "-c", code, start_new_session=True)
        finally:
            worker = subprocess.run(
                ["pgrep", "-s", str(here.started[0].pid)], capture_output=True, text=True, check=False
            )
            assert len(worker.stdout.split()) == 2
        assert (caller.binary, caller.ancestors, caller.problem) == (program, (), "")
        os.killpg(here.started[0].pid, signal.SIGKILL)


def test_a_deleted_program_keeps_its_path_and_hash(open_tmp: pathlib.Path) -> None:
    """A program removed while it runs (an upgrade) is still known by what it was; nothing says " (deleted)"."""
    program = python(open_tmp, "upgraded")
    expected = digest(program)
    with world() as here:
        here.start([program, "-c", CALLING])
        connection = here.accept()
        os.unlink(program)
        caller = here.who(connection)
        assert (caller.binary, caller.sha256, caller.problem) == (program, expected, "")


def test_a_file_that_is_called_deleted_is_not_another(open_tmp: pathlib.Path) -> None:
    """A name that ends in " (deleted)" is not shortened to somebody else's."""
    program = python(open_tmp, "tool (deleted)")
    with world() as here:
        assert here.call(program, "-c", CALLING).binary == program


def test_a_program_replaced_at_its_path_is_refused(open_tmp: pathlib.Path) -> None:
    """Trust on first use: other content under a known path is refused; the same content again is not."""
    program = python(open_tmp, "tool")
    with world() as here:
        assert here.call(program, "-c", CALLING).problem == ""
        content = pathlib.Path(program).read_bytes()
        os.unlink(program)
        pathlib.Path(program).write_bytes(content)
        os.chmod(program, 0o755)
        assert here.call(program, "-c", CALLING).problem == ""
        os.unlink(program)
        pathlib.Path(program).write_bytes(content + b"\0")
        os.chmod(program, 0o755)
        changed = here.call(program, "-c", CALLING)
        assert (changed.binary, changed.problem_id) == ("", "binary_changed")
        assert "binary integrity check failed" in changed.problem


def test_a_replaced_ancestor_is_refused(open_tmp: pathlib.Path) -> None:
    """An ancestor can allow, so it is checked like the program itself."""
    above, below = python(open_tmp, "above"), python(open_tmp, "below")
    code = f"import subprocess,sys\nsubprocess.run([{below!r},'-c',{CALLING!r},*sys.argv[1:]])\n"
    with world() as here:
        assert here.call(above, "-c", code).ancestors == (above,)
        content = pathlib.Path(above).read_bytes()
        os.unlink(above)
        pathlib.Path(above).write_bytes(content + b"\0")
        os.chmod(above, 0o755)
        assert here.call(above, "-c", code).problem_id == "binary_changed"


def test_a_program_in_memory_has_no_name_of_its_choosing(open_tmp: pathlib.Path) -> None:
    """memfd_create(2) takes any name, slashes included; the caller is called /memfd: whatever the workload wrote."""
    program = python(open_tmp, "starter")
    code = (
        "import os,sys\nfd=os.memfd_create('/../usr/bin/git',0)\n"
        f"os.write(fd,b'')\ndata=open({program!r},'rb').read()\n"
        "while data: data=data[os.write(fd,data):]\n"
        f"os.execv(f'/proc/self/fd/{{fd}}',['git','-c',{CALLING!r},*sys.argv[1:]])\n"
    )
    with world() as here:
        caller = here.call(program, "-c", code)
        assert (caller.binary, caller.problem) == (programs.MEMFD, "")
        assert caller.sha256 == digest(program)


def test_the_dynamic_linker_is_what_runs() -> None:
    """`ld.so PROGRAM` executes the linker: it is the caller, not the program that it was given."""
    linker = next(pathlib.Path("/").glob("lib*/ld-linux*.so*"), None)
    if linker is None:
        pytest.skip("needs the GNU dynamic linker in /lib*")
    target = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    with world() as here:
        caller = here.call(str(linker), target, "-c", CALLING)
        assert caller.binary == os.path.realpath(linker)
        assert target in caller.cmdline


@pytest.mark.root
def test_a_path_made_up_in_another_mount_namespace_is_refused(open_tmp: pathlib.Path) -> None:
    """Mounted over a well-known path where only the caller sees it: /proc says that path, and it is not believed. At a path of
    its own in that namespace the same program is known."""
    program, victim = python(open_tmp, "evil"), python(open_tmp, "git")
    with world() as here:
        plain = ["unshare", "--mount", program, "-c", CALLING]
        assert here.call(*plain).binary == program
        covered = ["unshare", "--mount", "sh", "-c", f'mount --bind {program} {victim} && exec {victim} -c "$@"', "sh"]
        caller = here.call(*covered, CALLING)
        assert (caller.binary, caller.problem_id) == ("", "caller_ambiguous")
        # Deleted, it is at no path at all; then the namespace that it was started in says what its path is worth.
        elsewhere = open_tmp / "elsewhere"
        elsewhere.mkdir()
        gone = f'mount -t tmpfs none {elsewhere} && cp {program} {elsewhere}/git && exec {elsewhere}/git -c "$@"'
        code = f"import os\nos.unlink({str(elsewhere / 'git')!r})\n{CALLING}"
        assert here.call("unshare", "--mount", "sh", "-c", gone, "sh", code).problem_id == "caller_ambiguous"


async def test_many_at_once_on_few_threads(open_tmp: pathlib.Path) -> None:
    """Forty connections asked for at once are all answered rightly, and no more than two threads were made for it."""
    program = python(open_tmp, "many")
    code = (
        "import socket,sys\nss=[]\nfor _ in range(40):\n s=socket.create_connection((sys.argv[1],int(sys.argv[2])))\n"
    )
    code += " s.sendall(b'hello')\n ss.append(s)\nsys.stdin.read()\n"
    with world() as here:
        here.start([program, "-c", code])
        connections = [here.accept() for _ in range(40)]
        callers = Callers(table(), os.getpid())
        try:
            answers = await asyncio.gather(*(callers.of(c.getpeername(), c.getsockname()) for c in connections))
            names = [thread.name for thread in threading.enumerate() if thread.name.startswith("callers")]
        finally:
            callers.close()
        assert {answer.binary for answer in answers} == {program}
        assert len(names) <= 2
        assert (await callers.of(("127.0.0.1", 1), here.address)).problem_id == "caller_unknown"
