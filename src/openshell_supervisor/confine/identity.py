"""Who the workload is: the driver's numbers, the image's USER, the policy's names, resolved once to uid, gid and groups.

Follows contract 1.6. Each of user and group is settled by itself: what the policy says, else what the image declares, else
the account `sandbox`; never by what the supervisor happens to be, because that is root. What it refuses to know: how the
identity is taken (the launcher does that) and how an image's account files are read (`confine.accounts`).
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from openshell_supervisor.confine.accounts import (
    DEFAULT_HOME,
    AccountFiles,
    User,
    image_group,
    image_user,
    is_number,
    number,
    refusal,
    with_groups,
)

DEFAULT_ACCOUNT = "sandbox"
# The overflow uid and gid, "nobody" (kernel/sys.c, overflowuid): taken when root starts a workload and no account says who.
NOBODY = 65534
CAP_SETGID, CAP_SETUID = 1 << 6, 1 << 7  # linux/capability.h
IDENTITY_CAPABILITIES = CAP_SETGID | CAP_SETUID


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
    files: AccountFiles = field(default_factory=AccountFiles)


def resolve(inputs: IdentityInputs) -> Identity:
    """The workload's identity. Raises `ConfineError` with a hint when the inputs contradict each other or name nobody."""
    for text in (inputs.oci_user or "", inputs.sandbox_uid, inputs.sandbox_gid):
        if not _is_utf8(text):
            raise refusal("a variable that says who the workload is is not valid UTF-8", "unset it, or set it anew")
    if inputs.sandbox_uid or inputs.sandbox_gid:
        return _within_reach(_driver_numbers(inputs))
    if inputs.oci_user is not None:
        return _within_reach(_of_image(inputs, inputs.oci_user))
    if not inputs.run_as_user and not inputs.run_as_group:
        return _nobody_said(inputs)
    return _within_reach(_of_policy(inputs))


def must_be_possible(identity: Identity) -> None:
    """Raise `ConfineError` for an identity that this process cannot take: said before anything is built."""
    obstacle = _cannot_become(identity.uid) if identity.uid != os.geteuid() else ""
    if obstacle:
        raise refusal(
            f"the workload is to be uid {identity.uid}, and {obstacle}",
            "start as root with CAP_SETUID and CAP_SETGID, or name no user (`process` in the policy): the workload is then who "
            "the supervisor is",
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a byte that the environment's decoding could only carry as a surrogate
        return False
    return True


def _within_reach(identity: Identity) -> Identity:
    """Who already is that user, and may not change its groups, keeps them: nothing to drop, and setgroups would be refused."""
    if identity.uid == os.geteuid() and not effective_capabilities() & CAP_SETGID:
        return replace(identity, groups=None)
    return identity


# --- the driver's numbers ----------------------------------------------------------------------------------------------------


def _driver_numbers(inputs: IdentityInputs) -> Identity:
    if inputs.oci_user:
        raise refusal(
            "OPENSHELL_OCI_IMAGE_USER and OPENSHELL_SANDBOX_UID/GID are both set",
            "set either the image's user or the two numbers",
        )
    if not (inputs.sandbox_uid and inputs.sandbox_gid):
        raise refusal("OPENSHELL_SANDBOX_UID and OPENSHELL_SANDBOX_GID must be set together", "set the missing one")
    uid = number(inputs.sandbox_uid, "OPENSHELL_SANDBOX_UID")
    gid = number(inputs.sandbox_gid, "OPENSHELL_SANDBOX_GID")
    return Identity(uid, gid, (), inputs.sandbox_uid, DEFAULT_HOME)


# --- the policy's names, and the accounts of the system ------------------------------------------------------------------------


def _of_policy(inputs: IdentityInputs) -> Identity:
    """At least one of the policy's two fields is written; the other one is the account `sandbox`, where there is one."""
    note = ""
    if inputs.run_as_user:
        user = _policy_user(inputs.run_as_user)
    else:
        user, note = _default_user(inputs.environment)
    if inputs.run_as_group:
        return _joined(user, _policy_group(inputs.run_as_group), note)
    return _joined(user, *_default_group(user))


def _default_group(user: User) -> tuple[int, str]:
    """The gid where nobody said a group, and a note where that is not the group `sandbox`."""
    gid = _group_of_system(DEFAULT_ACCOUNT)
    if gid is not None:
        return gid, ""
    gid = user.uid if user.gid is None else user.gid
    return gid, f"nobody names a group and there is no group {DEFAULT_ACCOUNT!r}: taking gid {gid}"


def _joined(user: User, gid: int, note: str = "") -> Identity:
    """The identity of a user with that group; root's group and root are refused, whoever said them."""
    if user.uid == 0:
        raise refusal(f"user {user.name!r} is uid 0", "name an unprivileged user")
    if gid == 0:
        raise refusal(f"the group of user {user.name!r} is gid 0", "name an unprivileged group in run_as_group")
    groups = set() if user.listed is None else {gid, *user.listed}
    if user.system:
        # An account may be listed in group 0 without meaning it (useradd -g 0 in many images); the workload never is.
        groups |= {group for group in os.getgrouplist(user.name, gid) if group != 0}
    return Identity(user.uid, gid, tuple(sorted(groups)), user.name, user.home, note)


def _policy_user(text: str) -> User:
    if is_number(text):
        return User(number(text, "run_as_user"), text)
    user = _user_of_system(text)
    if user is None:
        raise refusal(f"user {text!r} does not exist here", "create the account, or give a numeric run_as_user")
    return user


def _policy_group(text: str) -> int:
    if is_number(text):
        return number(text, "run_as_group")
    gid = _group_of_system(text)
    if gid is None:
        raise refusal(f"group {text!r} does not exist here", "create the group, or give a numeric run_as_group")
    return gid


def _user_of_system(name: str) -> User | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return User(entry.pw_uid, name, entry.pw_dir or f"/home/{name}", entry.pw_gid, system=True)


def _group_of_system(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def _default_user(environment: Mapping[str, str]) -> tuple[User, str]:
    """Who runs where only a group was said, and a note where that is not the account `sandbox`."""
    if os.geteuid() != 0:
        current = _current(environment)
        return User(current.uid, current.user, current.home), current.note
    user, note = _sandbox_or_nobody()
    obstacle = _cannot_become(user.uid)
    if obstacle:
        raise refusal(f"the policy names no user to take, and {obstacle}", "leave run_as_group out to stay who we are")
    return user, note


def _sandbox_or_nobody() -> tuple[User, str]:
    user = _user_of_system(DEFAULT_ACCOUNT)
    if user is not None:
        return user, ""
    note = f"the policy names no user and there is no account {DEFAULT_ACCOUNT!r}: running as uid {NOBODY} (nobody)"
    return User(NOBODY, "nobody", "/tmp", NOBODY), note


def _nobody_said(inputs: IdentityInputs) -> Identity:
    """Who is not root stays; root becomes the account `sandbox`, else nobody, and where it can become neither it stays, noted."""
    if os.geteuid() != 0:
        return _current(inputs.environment)
    user, note = _sandbox_or_nobody()
    obstacle = _cannot_become(user.uid)
    if obstacle:
        home = inputs.environment.get("HOME", "/root")
        return Identity(0, os.getegid(), None, "root", home, f"the policy names no user, and {obstacle}")
    if note:
        return _joined(user, NOBODY, note)
    return _joined(user, *_default_group(user))


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


# --- the image's USER ----------------------------------------------------------------------------------------------------------


def _of_image(inputs: IdentityInputs, declaration: str) -> Identity:
    """The declaration `user[:group]` fills what the policy leaves out; with both fields written it is not looked at."""
    if inputs.run_as_user and inputs.run_as_group:
        identity = _of_policy(inputs)
    else:
        declared, separator, group = declaration.partition(":")
        needs_primary = not inputs.run_as_group and not separator
        image = None if inputs.run_as_user and not needs_primary else image_user(inputs.files, declared, needs_primary)
        user = (
            with_groups(inputs.files, image) if image and not inputs.run_as_user else _policy_user(inputs.run_as_user)
        )
        if inputs.run_as_group:
            gid = _policy_group(inputs.run_as_group)
        elif separator:
            gid = image_group(inputs.files, group)
        else:
            assert image is not None and image.gid is not None
            gid = image.gid
        identity = _joined(user, gid)
    return replace(identity, home=inputs.workdir) if inputs.workdir else identity
