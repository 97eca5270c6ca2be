"""Who the workload is: every way of saying it, who wins, and what is refused (contract 1.6, isolation 4.1)."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hosts
from openshell_supervisor.confine.accounts import AccountFiles
from openshell_supervisor.confine.identity import Identity, IdentityInputs, resolve
from openshell_supervisor.errors import ConfineError

PASSWD = """\
# made by the image
root:x:0:0:root:/root:/bin/sh

app:x:1234:1235:App:/home/app:/bin/sh
second:x:1300:1301::/srv/second:/bin/sh
rooted:x:1400:0::/home/rooted:/bin/sh
toor:x:0:1235::/:/bin/sh
twice:x:1500:1500::/a:/bin/sh
twice:x:1501:1501::/b:/bin/sh
same-a:x:1600:1600::/a:/bin/sh
same-b:x:1600:1601::/b:/bin/sh
short:x:1700:1700:/home/short
odd:x:17x0:1700::/home/odd:/bin/sh
homeless:x:1800:1800:::/bin/sh
"""
GROUP = """\
# and its groups
root:x:0:wheeled
app:x:1235:
staff:x:50:other,app
video:x:44:app
wheel:x:0:
wheeled:x:1900:
twice:x:61:
twice:x:62:
"""


def refused(inputs: IdentityInputs) -> ConfineError:
    """The error of inputs that name nobody."""
    with pytest.raises(ConfineError) as caught:
        resolve(inputs)
    assert caught.value.code == "identity_invalid" and caught.value.hint
    return caught.value


@pytest.fixture
def files(tmp_path: pathlib.Path) -> AccountFiles:
    """The image's account files."""
    passwd, group = tmp_path / "passwd", tmp_path / "group"
    passwd.write_text(PASSWD)
    group.write_text(GROUP)
    return AccountFiles(passwd, group)


# --- the driver's numbers


def test_the_drivers_numbers_win() -> None:
    """Kubernetes' pair overwrites what the policy says, and brings no groups of ours."""
    found = resolve(
        IdentityInputs(run_as_user="5", run_as_group="6", sandbox_uid="1234", sandbox_gid="1235", workdir="/w")
    )
    assert found == Identity(1234, 1235, (), "1234", "/sandbox")


def test_an_empty_declaration_beside_numbers_is_none() -> None:
    """A driver that clears the image's USER with an empty string means the numbers."""
    assert resolve(IdentityInputs(oci_user="", sandbox_uid="1234", sandbox_gid="1235")).uid == 1234


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (IdentityInputs(sandbox_uid="1234"), "together"),
        (IdentityInputs(sandbox_gid="1234"), "together"),
        (IdentityInputs(oci_user="", sandbox_uid="1234"), "together"),
        (IdentityInputs(oci_user="app", sandbox_uid="1234", sandbox_gid="1234"), "both set"),
        (IdentityInputs(oci_user="app", sandbox_uid="1234"), "both set"),
    ],
)
def test_contradictions(inputs: IdentityInputs, text: str) -> None:
    """One number alone, and numbers beside a declaration, are refused."""
    assert text in refused(inputs).message


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "4294967295", "99999999999", "9" * 5000, "root", " 5", "5 ", "+5", "5.0", "0x10", "²", "५", "\udcff"],
)
def test_numbers_out_of_range(text: str) -> None:
    """Zero, the kernel's "no change", and what is no decimal number are refused; the ends of the range are not."""
    error = refused(IdentityInputs(sandbox_uid=text, sandbox_gid="5"))
    assert "range [1, 4294967294]" in error.message or "UTF-8" in error.message
    refused(IdentityInputs(sandbox_uid="5", sandbox_gid=text))
    assert resolve(IdentityInputs(sandbox_uid="1", sandbox_gid="4294967294")).gid == 4294967294


# --- the image's USER


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("app", Identity(1234, 1235, (44, 50, 1235), "app", "/home/app")),
        ("app:video", Identity(1234, 44, (44, 50), "app", "/home/app")),
        ("app:77", Identity(1234, 77, (44, 50, 77), "app", "/home/app")),
        ("rooted:50", Identity(1400, 50, (50,), "rooted", "/home/rooted")),
        ("homeless", Identity(1800, 1800, (1800,), "homeless", "/home/homeless")),
        ("1234", Identity(1234, 1235, (), "1234", "/sandbox")),
        ("1234:staff", Identity(1234, 50, (), "1234", "/sandbox")),
        ("1999:1998", Identity(1999, 1998, (), "1999", "/sandbox")),
    ],
)
def test_the_images_user(files: AccountFiles, declared: str, expected: Identity) -> None:
    """A name brings every group that lists it, and its primary one; a number brings none, and needs no account with a group."""
    assert resolve(IdentityInputs(oci_user=declared, files=files)) == expected


def test_the_working_directory_is_home(files: AccountFiles) -> None:
    """Where the image's USER decides, HOME is the working directory; also when the policy names both and nothing is looked up."""
    assert resolve(IdentityInputs(oci_user="app", workdir="/work", files=files)).home == "/work"
    found = resolve(IdentityInputs(oci_user="", run_as_user="5", run_as_group="6", workdir="/work", files=files))
    assert (found.uid, found.gid, found.home) == (5, 6, "/work")


@pytest.mark.parametrize(
    ("user", "group", "declared", "uid", "gid"),
    [
        ("2000", "", "app", 2000, 1235),  # the group is the declared user's, as upstream has it
        ("2000", "", "app:video", 2000, 44),
        ("2000", "", "root:video", 2000, 44),
        ("", "3000", "app", 1234, 3000),
        ("", "3000", "1999", 1999, 3000),
        ("", "3000", "rooted", 1400, 3000),
        ("2000", "3000", "root", 2000, 3000),
    ],
)
def test_the_policy_wins_field_by_field(
    files: AccountFiles, user: str, group: str, declared: str, uid: int, gid: int
) -> None:
    """What the policy says stands; the declaration fills only what it leaves out."""
    found = resolve(IdentityInputs(run_as_user=user, run_as_group=group, oci_user=declared, files=files))
    assert (found.uid, found.gid) == (uid, gid)
    assert found.groups == (() if user else found.groups) and 0 not in (found.groups or ())


@pytest.mark.parametrize(("user", "group"), [("2000", "3000"), ("1", "4294967294")])
def test_both_fields_explicit_read_no_accounts(tmp_path: pathlib.Path, user: str, group: str) -> None:
    """With both fields in the policy the account files are never opened: they may be missing, and the declaration nonsense."""
    nowhere = AccountFiles(tmp_path / "no-passwd", tmp_path / "no-group")
    for declared in ("", "app", "root", ":::", "\x01"):
        found = resolve(IdentityInputs(run_as_user=user, run_as_group=group, oci_user=declared, files=nowhere))
        assert (found.uid, found.gid, found.groups) == (int(user), int(group), ())
    assert "cannot read" in refused(IdentityInputs(run_as_user=user, oci_user="app", files=nowhere)).message


def test_numbers_read_no_accounts(tmp_path: pathlib.Path) -> None:
    """An image without account files runs with `uid:gid`; without a group its primary group would have to be read."""
    nowhere = AccountFiles(tmp_path / "no-passwd", tmp_path / "no-group")
    assert resolve(IdentityInputs(oci_user="1234:1235", files=nowhere)).gid == 1235
    assert "cannot read" in refused(IdentityInputs(oci_user="1234", files=nowhere)).message


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ("", "OCI USER is required because run_as_user is omitted"),
        (":50", "OCI USER is required because run_as_user is omitted"),
        ("root", "root"),
        ("root:50", "root"),
        ("0", "root"),
        ("0:50", "root"),
        ("000", "root"),
        ("toor", "root"),
        ("rooted", "root's group"),
        ("app:", "is empty"),
        ("app:root", "root's group"),
        ("app:wheel", "root's group"),
        ("app:0", "range"),
        ("app:4294967295", "range"),
        ("4294967295:5", "range"),
        ("wheeled", "not in"),
        ("nobody-here", "not in"),
        ("app:nothing", "not in"),
        ("9999", "needs a passwd entry"),
        ("twice", "ambiguous"),
        ("1600", "ambiguous"),
        ("app:twice", "ambiguous"),
        ("short", "malformed"),
        ("odd", "number"),
        (" app", "malformed"),
        ("app ", "malformed"),
        ("ap\tp", "malformed"),
        ("ap\x7fp", "malformed"),
        ("ap\x85p", "malformed"),
        ("app:st\naff", "malformed"),
        ("app:staff:more", "malformed"),
        ("a" * 1025, "malformed"),
        ("app:" + "ä" * 513, "malformed"),
        ("²", "not in"),
        ("a\udcff", "UTF-8"),
    ],
)
def test_declarations_that_are_refused(files: AccountFiles, declared: str, text: str) -> None:
    """Root in every spelling, nobody, more than one, and what can be no name, each with its reason."""
    assert text in refused(IdentityInputs(oci_user=declared, files=files)).message


def test_membership_in_roots_group_is_refused(files: AccountFiles) -> None:
    """A named user that group 0 lists is refused; listed in another group it is not."""
    files.passwd.write_text("wheeled:x:1900:1900::/:/bin/sh\n")
    assert "group 0" in refused(IdentityInputs(oci_user="wheeled", files=files)).message
    files.group.write_text("wheel:x:1:wheeled\n")
    assert resolve(IdentityInputs(oci_user="wheeled", files=files)).groups == (1, 1900)


LONG = 8 * 1024
ROW = "app:x:1234:1235::/home/app:/bin/sh\n"


@pytest.mark.parametrize(
    ("good", "bad", "text"),
    [
        (ROW.encode(), ROW.encode() + b"caf\xe9:x:1:1::/:/\n", "UTF-8"),
        ("café:x:1:1::/:/\n".encode() + ROW.encode(), b"\xff" + ROW.encode(), "UTF-8"),
        (b"#" * LONG + b"\n" + ROW.encode(), b"#" * (LONG + 1) + b"\n" + ROW.encode(), "line"),
        (b"x:" + b"y" * 1024 + b"\n" + ROW.encode(), b"x:" + b"y" * 1025 + b"\n" + ROW.encode(), "field"),
        (ROW.encode() + b"\n" * (1024**2 - len(ROW)), ROW.encode() + b"\n" * (1024**2 + 1 - len(ROW)), "too large"),
        (ROW.encode().replace(b"\n", b"\r\n"), b"nobody:x:1:1::/:/\r\n", "not in"),
        (b"+::::::\n" + ROW.encode(), b"app:x:1234:1235\n" + ROW.encode(), "ambiguous"),
    ],
)
def test_account_files_are_bounded(files: AccountFiles, good: bytes, bad: bytes, text: str) -> None:
    """Bytes, lines, fields, encoding: at the limit the account is found, one beyond it is refused."""
    files.group.write_text("")
    files.passwd.write_bytes(good)
    assert resolve(IdentityInputs(oci_user="app", files=files)).uid == 1234
    files.passwd.write_bytes(bad)
    assert text in refused(IdentityInputs(oci_user="app", files=files)).message


@pytest.mark.parametrize("row", ["staff:x:50", "staff:x:50:a:b", "staff:x:5o:app", "staff:x:4294967295:app"])
def test_malformed_groups_are_refused(files: AccountFiles, row: str) -> None:
    """A group row that cannot be read might list the user: it is refused and not passed over."""
    files.group.write_text("staff:x:50:app\n")
    assert resolve(IdentityInputs(oci_user="app", files=files)).groups == (50, 1235)
    files.group.write_text(row + "\n")
    refused(IdentityInputs(oci_user="app", files=files))


@pytest.mark.parametrize("kind", ["link", "directory", "fifo", "missing"])
def test_only_regular_files_are_read(files: AccountFiles, kind: str) -> None:
    """A link, a directory, a pipe without a writer and a missing file are refused at once; the plain file was read."""
    inputs = IdentityInputs(oci_user="app", files=files)
    assert resolve(inputs).uid == 1234
    aside = files.passwd.rename(files.passwd.with_name("aside"))
    if kind == "link":
        files.passwd.symlink_to(aside)
    elif kind == "directory":
        files.passwd.mkdir()
    elif kind == "fifo":
        os.mkfifo(files.passwd)
    assert str(files.passwd) in refused(inputs).message


@given(st.text(max_size=40) | st.from_regex(r"[a-z0-9]{0,4}:?[a-z0-9]{0,4}", fullmatch=True))
def test_no_declaration_makes_root(declared: str) -> None:
    """Whatever an image declares, the outcome is an unprivileged identity or a refusal."""
    files = AccountFiles(pathlib.Path("/etc/passwd"), pathlib.Path("/etc/group"))
    try:
        found = resolve(IdentityInputs(oci_user=declared, files=files))
    except ConfineError:
        return
    assert found.uid > 0 and found.gid > 0 and 0 not in (found.groups or ())


# --- the policy's names, through the system's database


def system(passwd: str, group: str, place: pathlib.Path) -> Callable[[Sequence[str]], list[str]]:
    """A wrapper that runs a command where /etc/passwd and /etc/group have this content."""
    return lambda argv: hosts.with_accounts(argv, passwd, group, place)


SAYING = """
import json, sys
from openshell_supervisor.confine.identity import IdentityInputs, resolve
from openshell_supervisor.errors import ConfineError
try:
    found = resolve(IdentityInputs(**json.loads(sys.argv[1])))
    print(json.dumps([found.uid, found.gid, found.groups, found.user, found.home, found.note]))
except ConfineError as error:
    print(json.dumps(error.message))
"""


def say(wrap: Callable[[list[str]], list[str]], **inputs: str) -> Any:
    """What a process of its own resolves: [uid, gid, groups, user, home, note], or the refusal's text."""
    done = hosts.run(wrap([sys.executable, "-c", SAYING, json.dumps(inputs)]))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SYSTEM_PASSWD = "root:x:0:0::/root:/bin/sh\nsandbox:x:1000:1001::/home/box:/bin/sh\nzero:x:0:5::/:/bin/sh\n"
SYSTEM_GROUP = "root:x:0:sandbox\nsandbox:x:1002:\ndocker:x:55:sandbox,other\nother:x:56:\n"


@pytest.mark.root
@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, [1000, 1002, [55, 1002], "sandbox", "/home/box", ""]),
        ({"run_as_user": "sandbox"}, [1000, 1002, [55, 1002], "sandbox", "/home/box", ""]),
        ({"run_as_group": "77"}, [1000, 77, [55, 77], "sandbox", "/home/box", ""]),
        ({"run_as_user": "2000"}, [2000, 1002, [], "2000", "/sandbox", ""]),
        ({"run_as_user": "2000", "run_as_group": "other"}, [2000, 56, [], "2000", "/sandbox", ""]),
        ({"run_as_user": "zero"}, "uid 0"),
        ({"run_as_group": "root"}, "gid 0"),
        ({"run_as_user": "absent"}, "does not exist"),
        ({"run_as_group": "absent"}, "does not exist"),
        ({"run_as_user": "sandbox", "run_as_group": "sandbox", "oci_user": "root"},
         [1000, 1002, [55, 1002], "sandbox", "/home/box", ""]),
    ],
)  # fmt: skip
def test_what_is_left_out_is_the_account_sandbox(open_tmp: pathlib.Path, inputs: dict[str, str], expected: Any) -> None:
    """Each field that nobody writes is `sandbox`'s, never root's; and no workload is in group 0, also where the account is."""
    found = say(system(SYSTEM_PASSWD, SYSTEM_GROUP, open_tmp), **inputs)
    assert found == expected if isinstance(expected, list) else expected in found


@pytest.mark.root
def test_hosts_without_the_account(open_tmp: pathlib.Path) -> None:
    """Without such an account the user is nobody, without such a group the account's own, with a note; root's group never."""
    bare = system("root:x:0:0::/root:/bin/sh\n", "root:x:0:\n", open_tmp)
    uid, gid, groups, _, _, note = say(bare)
    assert (uid, gid, groups) == (65534, 65534, []) and "nobody" in note
    uid, gid, groups, _, _, note = say(bare, run_as_group="77")
    assert (uid, gid, groups) == (65534, 77, []) and "nobody" in note
    uid, gid, groups, _, _, note = say(bare, run_as_user="2000")
    assert (uid, gid, groups) == (2000, 2000, []) and "no group" in note
    ungrouped = system("sandbox:x:1000:1001::/home/box:/bin/sh\n", "root:x:0:\n", open_tmp)
    assert say(ungrouped)[:3] == [1000, 1001, [1001]]
    rooted = system("sandbox:x:1000:0::/home/box:/bin/sh\n", "root:x:0:\n", open_tmp)
    assert "gid 0" in say(rooted) and "gid 0" in say(rooted, run_as_user="sandbox")


@pytest.mark.root
def test_root_that_can_become_nobody_stays_and_says_so(open_tmp: pathlib.Path) -> None:
    """Without CAP_SETUID and CAP_SETGID the default is to stay root, with a note; what was asked for by name is kept."""
    system_with = system(SYSTEM_PASSWD, SYSTEM_GROUP, open_tmp)
    bound = lambda argv: system_with(hosts.without_caps(argv, "setuid", "setgid"))  # noqa: E731
    uid, _, groups, _, _, note = say(bound)
    assert (uid, groups) == (0, None) and "CAP_SETUID" in note
    assert say(system_with)[0] == 1000
    assert say(bound, run_as_user="sandbox")[0] == 1000
    assert "CAP_SETUID" in say(bound, run_as_group="77")


def test_a_user_that_is_not_root_stays() -> None:
    """Without privilege and without a word from anybody the workload is who we are; groups are left, not asked to change."""
    found = say(hosts.unprivileged)
    uid = os.geteuid() or hosts.THROWAWAY_UID
    assert found[:3] == [uid, os.getegid() or hosts.THROWAWAY_UID, None]
    assert "not root" in found[5]


def test_a_user_that_already_fits_changes_no_groups() -> None:
    """Numbers that name the user who we already are (a pre-dropped container) leave the groups alone; others set them."""
    uid = str(os.geteuid() or hosts.THROWAWAY_UID)
    assert say(hosts.unprivileged, sandbox_uid=uid, sandbox_gid=uid)[2] is None
    assert say(hosts.unprivileged, oci_user=f"{uid}:{uid}")[2] is None
    assert say(hosts.unprivileged, run_as_user=uid, run_as_group=uid)[2] is None
    assert say(hosts.unprivileged, sandbox_uid="65000", sandbox_gid="65000")[2] == []


@pytest.mark.root
def test_a_variable_that_is_no_text_is_refused() -> None:
    """A driver variable with bytes that are no UTF-8 ends the start by name, whatever the policy says."""
    argv = [sys.executable, "-m", "openshell_supervisor", "run", "--", "true"]
    environment = {**os.environb, b"OPENSHELL_OCI_IMAGE_USER": b"a\xff"}
    done = subprocess.run(argv, env=environment, capture_output=True, timeout=30, check=False, cwd="/")
    assert done.returncode == 1 and b"identity_invalid" in done.stderr and b"UTF-8" in done.stderr
