"""Who the workload is: the driver's numbers, the image's USER, the policy's names, resolved once to uid, gid and groups.

Follows contract 1.6. What it refuses to know: how the identity is taken (the launcher does that). Account files are read by a
bounded parser of our own where the image's USER decides, because NSS would run the image's code with our rights.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from openshell_supervisor.errors import ConfineError

DEFAULT_ACCOUNT = "sandbox"
# The overflow uid and gid, "nobody" (kernel/sys.c, overflowuid): taken when root starts a workload and no account says who.
NOBODY = 65534
IDENTITY_CAPABILITIES = (1 << 6) | (1 << 7)  # CAP_SETGID, CAP_SETUID (linux/capability.h)
MAX_ID = 2**32 - 2  # 2**32 - 1 means "leave unchanged" to setresuid(2)
# contract 1.6: account files beyond these are refused, not read.
MAX_ACCOUNT_FILE_BYTES = 1024 * 1024
MAX_ACCOUNT_LINE_BYTES = 8 * 1024


@dataclass(frozen=True, slots=True)
class Identity:
    """uid, gid and supplementary groups (None = leave as they are); `home` and `user` are for the environment.

    `note` says in a sentence how it was chosen when nobody chose it.
    """

    uid: int
    gid: int
    groups: tuple[int, ...] | None
    user: str
    home: str
    note: str = ""

    def as_plan(self) -> dict[str, object]:
        """The launcher's form."""
        return {"uid": self.uid, "gid": self.gid, "groups": None if self.groups is None else list(self.groups)}


@dataclass(frozen=True, slots=True)
class IdentityInputs:
    """What may say who the workload is. Empty strings count as absent, except `oci_user`, where None is absent."""

    run_as_user: str = ""
    run_as_group: str = ""
    oci_user: str | None = None
    sandbox_uid: str = ""
    sandbox_gid: str = ""
    workdir: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def resolve(inputs: IdentityInputs) -> Identity:
    """The workload's identity. Raises `ConfineError` with a hint when the inputs contradict each other or name nobody."""
    if inputs.sandbox_uid or inputs.sandbox_gid:
        return _driver_numbers(inputs)
    if inputs.oci_user is not None and not (inputs.run_as_user and inputs.run_as_group):
        return _image_user(inputs)
    if not inputs.run_as_user and not inputs.run_as_group:
        return _nobody_said(inputs)
    return _named(inputs.run_as_user, inputs.run_as_group)


def _refuse(message: str, hint: str) -> ConfineError:
    return ConfineError(message, code="identity_invalid", step="identity", hint=hint)


def _driver_numbers(inputs: IdentityInputs) -> Identity:
    if inputs.oci_user:
        raise _refuse(
            "OPENSHELL_OCI_IMAGE_USER and OPENSHELL_SANDBOX_UID/GID are both set",
            "set either the image's user or the two numbers",
        )
    if not (inputs.sandbox_uid and inputs.sandbox_gid):
        raise _refuse("OPENSHELL_SANDBOX_UID and OPENSHELL_SANDBOX_GID must be set together", "set the missing one")
    uid = _number(inputs.sandbox_uid, "OPENSHELL_SANDBOX_UID")
    gid = _number(inputs.sandbox_gid, "OPENSHELL_SANDBOX_GID")
    return Identity(uid, gid, (), str(uid), "/sandbox")


def _number(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_ID:
        raise _refuse(
            f"{what} must be a number in range [1, {MAX_ID}], got {text!r}",
            "give the numeric id of an unprivileged user",
        )
    return int(text)


def _nobody_said(inputs: IdentityInputs) -> Identity:
    if os.geteuid() != 0:
        return _current(inputs.environment)
    try:
        return _named(DEFAULT_ACCOUNT, DEFAULT_ACCOUNT)
    except ConfineError:
        account = f"the policy names no user and there is no account {DEFAULT_ACCOUNT!r}"
    obstacle = _cannot_become(NOBODY)
    if obstacle:
        return Identity(
            0, os.getegid(), None, "root", inputs.environment.get("HOME", "/root"), f"{account}, and {obstacle}"
        )
    return Identity(NOBODY, NOBODY, (), "nobody", "/tmp", f"{account}: running as uid {NOBODY} (nobody)")


def effective_capabilities() -> int:
    """This process's effective capabilities as the kernel's bit mask (proc(5), CapEff)."""
    with open("/proc/self/status") as status:
        return next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)


def _cannot_become(uid: int) -> str:
    """Why this process cannot take another uid, in a few words; empty when it can."""
    if effective_capabilities() & IDENTITY_CAPABILITIES != IDENTITY_CAPABILITIES:
        return "CAP_SETUID and CAP_SETGID are missing"
    with open("/proc/self/uid_map") as mapping:
        ranges = [(int(fields[0]), int(fields[2])) for fields in (line.split() for line in mapping)]
    if not any(first <= uid < first + count for first, count in ranges):
        return f"uid {uid} is not mapped in this user namespace"
    return ""


def _current(environment: Mapping[str, str]) -> Identity:
    uid, gid = os.geteuid(), os.getegid()
    home = environment.get("HOME", "/")
    return Identity(
        uid, gid, None, environment.get("USER", str(uid)), home, "the supervisor's own user, which is not root"
    )


def _named(user: str, group: str) -> Identity:
    """Names and numbers of the policy, through the system's account database."""
    uid, gid, name, home = os.geteuid(), os.getegid(), str(os.geteuid()), "/sandbox"
    groups: tuple[int, ...] = ()
    if user.isdigit():
        uid = _number(user, "run_as_user")
        gid, name = uid, user
    elif user:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise _refuse(
                f"user {user!r} does not exist here", "create the account, or give a numeric run_as_user"
            ) from None
        uid, gid, name, home = entry.pw_uid, entry.pw_gid, user, entry.pw_dir or f"/home/{user}"
    if group.isdigit():
        gid = _number(group, "run_as_group")
    elif group:
        try:
            gid = grp.getgrnam(group).gr_gid
        except KeyError:
            raise _refuse(
                f"group {group!r} does not exist here", "create the group, or give a numeric run_as_group"
            ) from None
    if user and not user.isdigit():
        groups = tuple(sorted(os.getgrouplist(user, gid)))
    if os.geteuid() != 0 and uid == os.geteuid():
        return Identity(uid, gid, None, name, home)
    return Identity(uid, gid, groups, name, home)


def _image_user(inputs: IdentityInputs) -> Identity:
    """The image's USER declaration `user[:group]`, filling only what the policy leaves out; root is refused."""
    declared_user, separator, declared_group = (inputs.oci_user or "").partition(":")
    user = inputs.run_as_user or declared_user
    group = inputs.run_as_group or declared_group
    if not user:
        raise _refuse(
            "OCI USER is required because run_as_user is omitted", "give the image a USER, or the policy a run_as_user"
        )
    if separator and not group:
        raise _refuse(f"the image's USER {inputs.oci_user!r} has an empty group", "write USER as user or user:group")
    accounts = _account_rows("/etc/passwd", 7)
    row = (
        _unique(accounts, user, "/etc/passwd")
        if not user.isdigit()
        else next((r for r in accounts if r[2] == user), None)
    )
    if row is None and not user.isdigit():
        raise _refuse(f"user {user!r} of the image's USER is not in /etc/passwd", "create the account in the image")
    uid = int(user) if user.isdigit() else int(row[2]) if row else 0
    gid = _image_group(group, row)
    if uid == 0 or gid == 0:
        raise _refuse(
            f"the image's USER {inputs.oci_user!r} is root",
            "declare an unprivileged USER, or set run_as_user and run_as_group",
        )
    groups = (
        set()
        if user.isdigit()
        else {gid} | {int(r[2]) for r in _account_rows("/etc/group", 4) if user in r[3].split(",")}
    )
    if 0 in groups:
        raise _refuse(f"user {user!r} belongs to group 0", "take the user out of the root group")
    return Identity(uid, gid, tuple(sorted(groups)), user, inputs.workdir or (row[5] if row else "/sandbox"))


def _image_group(group: str, row: list[str] | None) -> int:
    if group.isdigit():
        return int(group)
    if group:
        found = _unique(_account_rows("/etc/group", 4), group, "/etc/group")
        if found is None:
            raise _refuse(f"group {group!r} of the image's USER is not in /etc/group", "create the group in the image")
        return int(found[2])
    if row is None:
        raise _refuse(
            "a numeric image USER without a group needs a passwd entry for its primary group", "write USER as uid:gid"
        )
    return int(row[3])


def _unique(rows: list[list[str]], name: str, source: str) -> list[str] | None:
    matches = [row for row in rows if row[0] == name]
    if len(matches) > 1:
        raise _refuse(f"{name!r} stands more than once in {source}", "remove the duplicate entry")
    return matches[0] if matches else None


def _account_rows(path: str, fields: int) -> list[list[str]]:
    """The rows of an account file that have `fields` columns; bounded, regular, never through a symlink."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _refuse(f"cannot read {path}: {error.strerror}", "an image USER needs account files") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _refuse(f"{path} is not a regular file", "replace it with one")
        data = file.read(MAX_ACCOUNT_FILE_BYTES + 1)
    if len(data) > MAX_ACCOUNT_FILE_BYTES or any(len(line) > MAX_ACCOUNT_LINE_BYTES for line in data.split(b"\n")):
        raise _refuse(
            f"{path} is too large", f"at most {MAX_ACCOUNT_FILE_BYTES} bytes and {MAX_ACCOUNT_LINE_BYTES} a line"
        )
    rows = [
        line.split(":") for line in data.decode("utf-8", "replace").split("\n") if line and not line.startswith("#")
    ]
    return [row for row in rows if len(row) == fields and row[2].isdigit()]
