"""What the answers of the tries mean: what was not tried is never ok, hints follow what the host says about itself."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import pytest

from openshell_supervisor.confine.landlock_abi import Support
from openshell_supervisor.doctor import kernel, namespaces, rights, surroundings
from openshell_supervisor.doctor.attempt import Outcome, Step, _Lost
from openshell_supervisor.doctor.checks import Check, Severity, State, failed, ok
from openshell_supervisor.doctor.files import Files

UNLIMITED = ((1024, 524288), (-1, -1), (0, 0))
HAS_LANDLOCK = Support(7, None, "", 0)


def tree(root: pathlib.Path, **files: str) -> Files:
    """Files below /proc/sys, named with `__` for `/`, and a status that shows no filter."""
    named = {f"/proc/sys/{name.replace('__', '/')}": content for name, content in files.items()}
    for path, content in {"/proc/self/status": "Seccomp:\t0\nCapEff:\t0\n", **named}.items():
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
    return Files(root)


def refused(*steps: tuple[str, str | None]) -> Outcome:
    """A try whose last step the host refused with this errno; those before it worked."""
    worked = [Step(name, None, "") for name, _ in steps[:-1]]
    return Outcome((*worked, Step(steps[-1][0], steps[-1][1], "no")))


def all_checks(files: Files, tries: Any) -> dict[str, Check]:
    """Everything that rests on tries."""
    found = [
        *kernel.checks(files, tries, HAS_LANDLOCK),
        *namespaces.checks(files, tries),
        *rights.checks(files, tries, UNLIMITED),
    ]
    return {check.id: check for check in found}


def test_what_was_not_tried_is_a_warning_and_never_ok(tmp_path: pathlib.Path) -> None:
    """The process that tries things was lost: every check that rests on it says so, with a hint."""
    checks = all_checks(tree(tmp_path, user__max_user_namespaces="100"), _Lost("no end within 6 s"))
    tried = {
        *("kernel.landlock", "seccomp.calls", "seccomp.filter", "seccomp.all_threads", "privileges.no_new_privs"),
        *("userns.create", "netns.create", "mount.private", "nft.fence", "nft.log"),
    }
    for name in tried:
        assert checks[name].state is State.WARNING, name
        assert checks[name].facts["inconclusive"] is True, name
    assert not {check.id for check in checks.values() if check.state is State.OK} - {
        "limits.open_files",
        "limits.address_space",
        "privileges.identity",  # of a plain user; root's rests on a try
    }


@pytest.mark.parametrize(
    ("sysctls", "step", "errno", "hint"),
    [
        ({"user__max_user_namespaces": "0"}, "unshare", "ENOSPC", "user.max_user_namespaces=15000"),
        ({"kernel__unprivileged_userns_clone": "0"}, "unshare", "EPERM", "kernel.unprivileged_userns_clone=1"),
        (
            {"kernel__apparmor_restrict_unprivileged_userns": "1"},
            "write uid_map",
            "EPERM",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ({}, "unshare", "EINVAL", "CONFIG_USER_NS"),
        ({}, "raise lo", "EAFNOSUPPORT", "--network=sandbox"),
        ({}, "unshare", "EPERM", "no seccomp filter lies on this process"),
    ],
)
def test_why_there_is_no_user_namespace(
    sysctls: dict[str, str], step: str, errno: str, hint: str, tmp_path: pathlib.Path
) -> None:
    """The same refusal is mended in different ways; the host's own settings say which."""
    tries = {"user_namespace": refused((step, errno)), **dict.fromkeys(("network_namespace", "mount"), Outcome())}
    checks = {check.id: check for check in namespaces.checks(tree(tmp_path, **sysctls), tries)}
    assert checks["userns.create"].state is State.FAILED
    assert hint in checks["userns.create"].hint


def test_each_limit_of_namespaces_is_blamed_for_its_own_refusal(tmp_path: pathlib.Path) -> None:
    """One call makes both namespaces and answers ENOSPC for either; whether a user namespace alone works tells which."""
    files = tree(tmp_path, user__max_user_namespaces="5", user__max_net_namespaces="7")
    for alone, wrong in ((False, "userns.limit"), (True, "netns.limit")):
        outcome = Outcome(refused(("unshare", "ENOSPC")).steps, {"user_alone": alone})
        tries = {"user_namespace": outcome, "network_namespace": refused(("unshare", "EPERM")), "mount": Outcome()}
        checks = {check.id: check.state for check in namespaces.checks(files, tries)}
        assert checks[wrong] is State.FAILED
        assert checks[{"userns.limit", "netns.limit"}.difference((wrong,)).pop()] is State.INFO


def test_a_fence_without_a_rule_that_only_reports_is_a_small_loss(tmp_path: pathlib.Path) -> None:
    """It holds, and says which rule the kernel lacks; a fence that is refused is a failure with the module's name."""
    steps = tuple(Step(name, None, "") for name in ("unshare", "raise lo", "nft", "nflog"))
    tries = {name: Outcome(steps) for name in ("user_namespace", "network_namespace", "mount")}
    files = tree(tmp_path)
    assert next(c for c in namespaces.checks(files, tries) if c.id == "nft.fence").state is State.OK
    lesser = {**tries, "network_namespace": Outcome(steps, {"left_out": {"log_tcp": "ENOENT"}})}
    check = next(c for c in namespaces.checks(files, lesser) if c.id == "nft.fence")
    assert (check.state, check.severity, check.facts["left_out"]) == (
        State.WARNING,
        Severity.LOW,
        {"log_tcp": "ENOENT"},
    )
    none = dict.fromkeys(tries, refused(("unshare", None), ("raise lo", None), ("nft", "ENOENT")))
    check = next(c for c in namespaces.checks(files, none) if c.id == "nft.fence")
    assert check.state is State.FAILED
    assert "modprobe nf_tables" in check.hint


@pytest.mark.parametrize(
    ("support", "state", "text"),
    [
        (Support(7, None, "", 0), State.OK, "ABI 7"),
        (Support(1, None, "", 0), State.WARNING, "truncate, ioctl on devices, scopes"),
        (Support(5, None, "", 0), State.WARNING, "cannot restrict scopes"),
        (Support(0, 38, "the kernel has no Landlock", 0), State.FAILED, "ENOSYS"),
        (Support(0, 95, "started without it", 0), State.FAILED, "ENOTSUP"),
    ],
)
def test_landlock_by_its_version(support: Support, state: State, text: str, tmp_path: pathlib.Path) -> None:
    """What an older one cannot restrict is named; without any, the errno and what to do."""
    works = Outcome((Step("the ruleset answers", None, ""),))
    tries = dict.fromkeys(("landlock", "calls", "filter", "filter_for_all_threads"), works)
    check = next(c for c in kernel.checks(tree(tmp_path), tries, support) if c.id == "kernel.landlock")
    assert check.state is state
    assert text in check.summary


def test_libc_falls_back_from_a_clone3_that_is_not_there(tmp_path: pathlib.Path) -> None:
    """ENOSYS is what runtimes answer on purpose; EPERM breaks every thread, and is a failure."""
    others = [Step(name, None, "") for name in kernel.NEEDED_FOR if name != "clone3"]
    for errno, state in (("ENOSYS", State.OK), ("EPERM", State.FAILED)):
        calls = Outcome((*others, Step("clone3", errno, "no")))
        tries = {**dict.fromkeys(("landlock", "filter", "filter_for_all_threads"), Outcome()), "calls": calls}
        check = next(c for c in kernel.checks(tree(tmp_path), tries, HAS_LANDLOCK) if c.id == "seccomp.calls")
        assert check.state is state


def test_capabilities_have_names() -> None:
    """The first and the last known, and a number for what a newer kernel adds (linux/capability.h)."""
    assert rights.names("0000000000000001") == ["chown"]
    assert rights.names(f"{1 << 12 | 1 << 21:016x}") == ["net_admin", "sys_admin"]
    assert rights.names(f"{1 << 40 | 1 << 45:016x}") == ["checkpoint_restore", "cap_45"]
    assert rights.names("") == []


@pytest.mark.parametrize(
    ("limits", "warned"),
    [
        (UNLIMITED, set()),
        (((256, 256), (-1, -1), (0, 0)), {"limits.open_files"}),
        (((-1, -1), (1 << 30, 1 << 30), (-1, -1)), {"limits.address_space"}),
    ],
)
def test_limits_that_are_too_small_are_warned_of(
    limits: rights.Limits, warned: set[str], tmp_path: pathlib.Path
) -> None:
    """Open files and the address space; core files are only stated. -1 is RLIM_INFINITY."""
    checks = rights.checks(tree(tmp_path), {"identity": Outcome()}, limits)
    assert {check.id for check in checks if check.id.startswith("limits") and check.state is State.WARNING} == warned


CGROUP2 = "30 20 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
CGROUP1 = "31 20 0:27 {} /sys/fs/cgroup/pids ro - cgroup cgroup rw,pids\n"
PIDS: dict[str, tuple[dict[str, str], State, int | None]] = {
    "v2, a container's namespace": (
        {"/proc/self/mountinfo": CGROUP2, "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/pids.max": "512\n"},
        State.OK,
        512,
    ),
    "v2, the smallest above us counts": (
        {
            "/proc/self/mountinfo": CGROUP2,
            "/proc/self/cgroup": "0::/a/b\n",
            "/sys/fs/cgroup/a/b/pids.max": "max\n",
            "/sys/fs/cgroup/a/pids.max": "100\n",
        },
        State.OK,
        100,
    ),
    "v2, none": (
        {"/proc/self/mountinfo": CGROUP2, "/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/pids.max": "max\n"},
        State.WARNING,
        None,
    ),
    "v1": (
        {
            "/proc/self/mountinfo": CGROUP1.format("/docker/0a"),
            "/proc/self/cgroup": "3:pids:/docker/0a\n0::/\n",
            "/sys/fs/cgroup/pids/pids.max": "64\n",
        },
        State.OK,
        64,
    ),
    "v1, the root": (
        {
            "/proc/self/mountinfo": CGROUP1.format("/"),
            "/proc/self/cgroup": "3:pids:/\n",
            "/sys/fs/cgroup/pids/cgroup.procs": "1\n",
        },
        State.WARNING,
        None,
    ),
    "hidden": ({"/proc/self/cgroup": "0::/\n"}, State.WARNING, None),
}


@pytest.mark.parametrize("host", PIDS)
def test_the_limit_on_processes_is_found_where_it_is(host: str, tmp_path: pathlib.Path) -> None:
    """In both versions of cgroups, ours or above; none found is a warning, and one that could not be looked for says so."""
    files, state, limit = PIDS[host]
    for path, content in files.items():
        (tmp_path / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.lstrip("/")).write_text(content)
    checks = {check.id: check for check in surroundings.checks(Files(tmp_path), {})}
    found = checks["cgroup.pids"]
    assert (found.state, found.facts["limit"]) == (state, limit)
    assert ("inconclusive" in found.facts) == (host == "hidden")


def test_no_place_for_a_run_is_a_failure(tmp_path: pathlib.Path) -> None:
    """A directory that cannot be, below a file; its neighbour can be used, and nothing is made in either."""
    (tmp_path / "file").touch()
    wanted = {tmp_path / "file" / "run": State.FAILED, tmp_path / "run": State.OK}
    for path, state in wanted.items():
        checks = surroundings.checks(Files(), {}, path)
        assert next(check for check in checks if check.id == "mounts.run_directory").state is state
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_proc_that_hides_or_cannot_be_written_is_warned_of(tmp_path: pathlib.Path) -> None:
    """hidepid hides neighbours, a read-only /proc takes no maps; one that is only masked is as every runtime makes it."""
    lines = {
        "30 20 0:5 / /proc rw - proc proc rw,hidepid=invisible\n": State.WARNING,
        "30 20 0:5 / /proc ro - proc proc ro\n": State.WARNING,
        "30 20 0:5 / /proc rw - proc proc rw\n31 30 0:6 / /proc/kcore rw - tmpfs tmpfs rw\n": State.INFO,
        "": State.FAILED,
    }
    for number, (text, state) in enumerate(lines.items()):
        place = tmp_path / str(number) / "proc" / "self"
        place.mkdir(parents=True)
        (place / "mountinfo").write_text(text)
        checks = surroundings.checks(Files(tmp_path / str(number)), {})
        assert next(check for check in checks if check.id == "mounts.proc").state is state, text


def test_a_check_cannot_be_wrong_without_a_hint() -> None:
    """The shape holds it, so that no check forgets it; severity belongs to what is wrong."""
    with pytest.raises(ValueError, match="no hint"):
        failed("x.y", Severity.HIGH, "broken", "")
    with pytest.raises(ValueError, match="severity"):
        failed("x.y", Severity.NONE, "broken", "mend it")
    assert ok("x.y", "fine").severity is Severity.NONE


def test_a_fifo_or_an_endless_file_does_not_hold_the_doctor(tmp_path: pathlib.Path) -> None:
    """Files of a host are bounded, and never waited for."""
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_bytes(b"x" * 2_000_000)
    files = Files(tmp_path)
    assert files.text("/fifo") == ""
    assert len(files.text("/long") or "") == 512 * 1024
    assert files.text("/absent") is None
    assert list(itertools.islice(files.lines("/absent"), 1)) == []
