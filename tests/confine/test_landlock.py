"""Rulesets as objects: what the kernel answers where Landlock is missing, no_new_privs, descriptors, words, and what it costs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable

import pytest

import hosts
from openshell_supervisor.confine import landlock, landlock_abi
from openshell_supervisor.errors import ConfineError

needs_landlock = pytest.mark.skipif(landlock.support().abi == 0, reason="needs Landlock in the kernel")

REFUSED = """
import json
from openshell_supervisor.confine import landlock
from openshell_supervisor.errors import ConfineError
found = landlock.support()
try:
    landlock.build(landlock.Rules(("/usr",), hard=%r))
except ConfineError as error:
    print(json.dumps([found.abi, found.errno, found.reason, error.code, error.errno, error.step, error.message, error.hint]))
"""


@needs_landlock
def test_the_kernel_says_what_it_has() -> None:
    """An ABI of at least 1, no errno, no hint; the package's own question gets the same number."""
    from landlock import landlock_abi_version

    found = landlock.support()
    assert (found.abi, found.errno, found.reason, found.hint) == (landlock_abi_version(), None, "", "")


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL])
def test_without_landlock(number: int, hard: bool) -> None:
    """However an outer filter (as in gVisor, or a container's profile) refuses it: ABI 0, its errno, a reason and a hint."""
    program = [sys.executable, "-c", REFUSED % hard]
    done = hosts.run(hosts.outer_seccomp(program, "landlock_create_ruleset", answer=number))
    assert done.returncode == 0, done.stderr
    abi, code, reason, error, error_number, step, message, hint = json.loads(done.stdout)
    assert (abi, code, error, error_number, step) == (
        0,
        number,
        "landlock_unavailable",
        number,
        "landlock_create_ruleset",
    )
    assert reason == landlock_abi.REASONS.get(number, os.strerror(number))
    assert message.startswith("Landlock unavailable" + (" in hard_requirement mode: " if hard else ": ") + reason)
    assert hint


@needs_landlock
def test_a_filter_that_forbids_rules_is_named() -> None:
    """Where only landlock_add_rule is forbidden, that is the failing step, and no path is blamed for it."""
    done = hosts.run(hosts.outer_seccomp([sys.executable, "-c", REFUSED % False], "landlock_add_rule"))
    assert done.returncode == 0, done.stderr
    abi, _, _, error, number, step, _, hint = json.loads(done.stdout)
    assert (abi > 0, error, number, step) == (True, "landlock_build_failed", errno.EPERM, "landlock_add_rule")
    assert "landlock_add_rule" in hint


@needs_landlock
def test_a_stale_errno_is_no_failure() -> None:
    """A call that failed earlier does not make a ruleset fail (the package's own calls look at errno alone)."""
    import ctypes

    ctypes.set_errno(errno.EBUSY)
    landlock.build(landlock.Rules(("/usr",), ("/tmp",))).close()
    assert ctypes.set_errno(0) == errno.EBUSY


@needs_landlock
def test_the_descriptor_is_ours_until_it_is_closed() -> None:
    """It is not inherited by accident; closing it twice closes nothing else; the context manager closes it."""
    with landlock.build(landlock.Rules(("/usr",))) as ruleset:
        fd = ruleset.fd
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[landlock-ruleset]"
        ruleset.close()
        taken = os.open("/dev/null", os.O_RDONLY)
        assert taken == fd
    assert ruleset.fd == -1
    os.close(taken)


@needs_landlock
@pytest.mark.root
def test_no_new_privs_is_needed_by_who_has_no_privileges(
    landlock_try: Callable, landlock_zones: Callable, landlock_rules: Callable
) -> None:
    """A plain user without no_new_privs gets EPERM and nothing is restricted; root hides the omission."""
    root = landlock_zones()
    tries = ("read", str(root / "out/file"))
    with landlock.build(landlock_rules(root)) as ruleset:
        assert landlock_try(ruleset, tries, uid=hosts.THROWAWAY_UID, nnp=False) == ["EPERM"]
        assert landlock_try(ruleset, tries, uid=hosts.THROWAWAY_UID) == ["EACCES"]
        assert landlock_try(ruleset, tries, nnp=False) == ["EACCES"]


@needs_landlock
def test_one_ruleset_restricts_many(landlock_try: Callable, landlock_zones: Callable, landlock_rules: Callable) -> None:
    """A ruleset is used up by nobody: a second child is restricted by it as the first one was."""
    root = landlock_zones()
    with landlock.build(landlock_rules(root)) as ruleset:
        for _ in range(2):
            assert landlock_try(ruleset, ("read", str(root / "out/file")), ("read", str(root / "ro/file"))) == [
                "EACCES",
                "ok",
            ]


@needs_landlock
def test_without_paths_files_are_left_alone(landlock_try: Callable, landlock_zones: Callable) -> None:
    """Ports and scopes alone restrict no file; asking for nothing at all is an error."""
    path = str(landlock_zones() / "out/file")
    if landlock.support().abi >= landlock_abi.SCOPE_ABI:
        with landlock.build(landlock.Rules()) as ruleset:
            assert ruleset.handled_fs == 0
            assert landlock_try(ruleset, ("write", path), ("signal", os.getpid())) == ["ok", "EPERM"]
    with pytest.raises(ConfineError) as caught:
        landlock.build(landlock.Rules(scopes=False))
    assert (caught.value.code, caught.value.errno) == ("landlock_build_failed", errno.ENOMSG)
    with pytest.raises(ConfineError):
        landlock.build(landlock.Rules(scopes=True), limit_abi=1)


@pytest.mark.skipif(landlock.support().abi < landlock_abi.NET_ABI, reason="needs Landlock ABI 4 in the kernel")
def test_a_port_that_does_not_exist() -> None:
    """Port 65536 is refused by the kernel and named; no descriptor stays open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfineError) as caught:
        landlock.build(landlock.Rules(("/usr",), connect_ports=(65536,)))
    assert (caught.value.code, caught.value.errno) == ("landlock_build_failed", errno.EINVAL)
    assert "port 65536" in str(caught.value)
    assert os.listdir("/proc/self/fd") == before


@needs_landlock
@pytest.mark.parametrize("abi", [8, 9, 100])
def test_a_newer_kernel_is_used_as_far_as_it_is_known(abi: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel of the future (none is here, so its answer is put in) the known rights are used and its ABI is told."""
    present = landlock.support()
    monkeypatch.setattr(landlock, "support", lambda: landlock.Support(abi, None, "", present.errata))
    for limit in (None, abi) if present.abi >= landlock_abi.KNOWN_ABI else (present.abi,):
        with landlock.build(landlock.Rules(("/usr",)), limit_abi=limit) as ruleset:
            assert (ruleset.abi, ruleset.kernel_abi) == (min(present.abi, landlock_abi.KNOWN_ABI), abi)
            assert f"the kernel has {abi}" in landlock.summary(ruleset)[1]


@needs_landlock
def test_the_audit_log_shows_what_the_workload_is_refused() -> None:
    """From ABI 7 the flags ask for a record after the execve; an older kernel would refuse any flag."""
    for abi in range(1, min(landlock.support().abi, landlock_abi.KNOWN_ABI) + 1):
        with landlock.build(landlock.Rules(("/usr",)), limit_abi=abi) as ruleset:
            assert ruleset.restrict_flags == (2 if abi >= 7 else 0)  # LANDLOCK_RESTRICT_SELF_LOG_NEW_EXEC_ON


def ruleset_of(abi: int, missing: tuple[str, ...], **fields: object) -> landlock.Ruleset:
    """A ruleset that is only told about."""
    rules = landlock.Rules(("/usr", "/absent"), ("/tmp",), connect_ports=(3128,), bind_ports=())
    net = landlock_abi.CONNECT_TCP | landlock_abi.BIND_TCP if abi >= landlock_abi.NET_ABI else 0
    made = landlock.Ruleset(rules, -1, abi, 7, 7, 1, net, 3 if abi >= landlock_abi.SCOPE_ABI else 0, 0, missing, 3)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("ruleset", "word", "said", "unsaid"),
    [
        (
            ruleset_of(7, ()),
            "fully",
            ["Landlock ABI 7;", "3 of 3 paths", "connect to port 3128 only", "bind to no port"],
            ["mediate"],
        ),
        (
            ruleset_of(7, (), skipped=(landlock.Skipped("/absent", "path does not exist", 2, True),)),
            "fully",
            ["1 does not"],
            ["/absent"],
        ),
        (
            ruleset_of(7, (), skipped=(landlock.Skipped("/x", "permission denied", 13, False),)),
            "partly",
            ["left out: /x (permission denied)"],
            ["exist"],
        ),
        (
            ruleset_of(4, ("ioctl_dev",)),
            "partly",
            ["does not mediate ioctl_dev", "ABI 4 (the kernel has 7)"],
            ["signals"],
        ),
        (ruleset_of(1, ("refer", "truncate")), "partly", ["mediate truncate", "cannot move"], ["mediate refer", "TCP"]),
    ],
)
def test_the_words_for_it(ruleset: landlock.Ruleset, word: str, said: list[str], unsaid: list[str]) -> None:
    """`fully` or `partly` with a sentence that names rights and paths; a path that is just not there makes nothing partial."""
    seen, sentence = landlock.summary(ruleset)
    assert seen == word
    assert all(text in sentence for text in said), sentence
    assert not any(text in sentence for text in unsaid), sentence
    assert json.loads(json.dumps(landlock.detail(ruleset)))["missing_rights"] == list(ruleset.missing_rights)


def test_the_import_is_cheap() -> None:
    """Neither the package nor ctypes is loaded before the first ruleset: a command that confines nothing does not pay."""
    program = (
        "import sys; from openshell_supervisor.confine import landlock, baseline;"
        "print([name for name in ('landlock', 'ctypes') if name in sys.modules])"
    )
    done = hosts.run([sys.executable, "-c", program])
    assert done.stdout.strip() == "[]", done.stderr or done.stdout
