"""An image's USER declaration, and the account files that it names, read by a bounded parser of our own.

The image wrote these files, and NSS would run the image's code with our rights to read them (contract 1.6). So: no name
service, no link, no special file, bounded bytes, lines and fields; a row that is looked for must be well-formed and unique.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from openshell_supervisor.errors import ConfineError

# contract 1.6: upstream's bounds. Files beyond them are refused, not read.
MAX_ACCOUNT_FILE_BYTES = 1024 * 1024
MAX_ACCOUNT_LINE_BYTES = 8 * 1024
MAX_ACCOUNT_FIELD_BYTES = 1024
MAX_ID = 2**32 - 2  # 2**32 - 1 means "leave unchanged" to setresuid(2)
DEFAULT_HOME = "/sandbox"  # contract 1.6: of every identity that no account describes
PASSWD_FIELDS, GROUP_FIELDS = 7, 4  # passwd(5), group(5)


def refusal(message: str, hint: str) -> ConfineError:
    """The error of everything that is wrong with who the workload should be."""
    return ConfineError(message, code="identity_invalid", step="identity", hint=hint)


def is_number(text: str) -> bool:
    """True for decimal digits as account files have them; no sign, no digits of other scripts."""
    return text.isascii() and text.isdigit()


def number(text: str, what: str, low: int = 1) -> int:
    """The id that `text` says. Raises `ConfineError` for anything but a number from `low` to `MAX_ID`."""
    if not is_number(text) or len(text) > MAX_ACCOUNT_FIELD_BYTES or not low <= int(text) <= MAX_ID:
        raise refusal(
            f"{what} must be a number in range [{low}, {MAX_ID}], got {text[:40]!r}",
            "give the numeric id of an unprivileged user",
        )
    return int(text)


def check_component(text: str, what: str) -> None:
    """Raise `ConfineError` unless `text` can be a name or number in an account file."""
    if not text:
        raise refusal(f"{what} is empty", "write USER as user or user:group")
    malformed = (
        len(text.encode("utf-8", "surrogateescape")) > MAX_ACCOUNT_FIELD_BYTES
        or text.strip() != text
        or any(char == ":" or ord(char) < 32 or 127 <= ord(char) < 160 for char in text)
    )
    if malformed:
        raise refusal(
            f"{what} {text[:40]!r} is malformed", "write USER as user or user:group, in plain names or numbers"
        )


@dataclass(frozen=True, slots=True)
class User:
    """The user half of an identity. `gid` is the primary group where an account says one; `listed` the groups that list it."""

    uid: int
    name: str
    home: str = DEFAULT_HOME
    gid: int | None = None
    system: bool = False  # the system's database knows it, and is asked for its groups
    listed: frozenset[int] | None = None  # None for a number: no name, so no group lists it


@dataclass(frozen=True, slots=True)
class Account:
    """What a passwd row says of a user."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class AccountFiles:
    """The image's two account files. Every question may raise `ConfineError`; files are read anew for each."""

    passwd: Path = Path("/etc/passwd")
    group: Path = Path("/etc/group")

    def account(self, name: str) -> Account | None:
        """The account of that name; None when there is none."""
        return self._account(lambda row: row[0] == name, repr(name))

    def account_of(self, uid: int) -> Account | None:
        """The account with that uid; None when there is none."""
        return self._account(lambda row: len(row) > 2 and is_number(row[2]) and int(row[2]) == uid, f"uid {uid}")

    def _account(self, wanted: Callable[[list[str]], bool], what: str) -> Account | None:
        row = _unique([row for row in _rows(self.passwd) if wanted(row)], PASSWD_FIELDS, what, self.passwd)
        if row is None:
            return None
        return Account(row[0], _id(row[2], self.passwd), _id(row[3], self.passwd), row[5])

    def group_named(self, name: str) -> int | None:
        """The gid of the group of that name; None when there is none."""
        row = _unique([row for row in _rows(self.group) if row[0] == name], GROUP_FIELDS, repr(name), self.group)
        return None if row is None else _id(row[2], self.group)

    def groups_listing(self, user: str) -> frozenset[int]:
        """The gids of all groups that list `user` as a member. A malformed row anywhere is an error: it might be one."""
        found = set()
        for row in _rows(self.group):
            if len(row) != GROUP_FIELDS:
                raise refusal(
                    f"{self.group} has a malformed entry for {row[0][:40]!r}", "mend the image's account file"
                )
            if user in row[3].split(","):
                found.add(_id(row[2], self.group))
        return frozenset(found)


def _unique(rows: list[list[str]], fields: int, what: str, source: Path) -> list[str] | None:
    if len(rows) > 1:
        raise refusal(f"{what} stands more than once in {source}: it is ambiguous", "remove the duplicate entry")
    if rows and len(rows[0]) != fields:
        raise refusal(f"the entry of {what} in {source} is malformed", f"it needs {fields} fields")
    return rows[0] if rows else None


def _id(text: str, source: Path) -> int:
    return number(text, f"an id in {source}", low=0)


def _rows(path: Path) -> list[list[str]]:
    """The rows of an account file as fields; comments and blank lines left out."""
    try:
        text = _read(path).decode()
    except UnicodeDecodeError:
        raise refusal(f"{path} is not valid UTF-8", "mend the image's account file") from None
    rows = []
    for line in text.split("\n"):
        if len(line.encode()) > MAX_ACCOUNT_LINE_BYTES:
            raise refusal(f"{path} has a line that is too long", f"at most {MAX_ACCOUNT_LINE_BYTES} bytes")
        row = line.removesuffix("\r").split(":")
        if any(len(field.encode()) > MAX_ACCOUNT_FIELD_BYTES for field in row) and not line.startswith("#"):
            raise refusal(f"{path} has a field that is too long", f"at most {MAX_ACCOUNT_FIELD_BYTES} bytes")
        if row != [""] and not line.startswith("#"):
            rows.append(row)
    return rows


def _read(path: Path) -> bytes:
    """The bytes of a regular file that is no link, within bounds."""
    hint = "a USER by name needs the image's account files"
    try:
        # O_NONBLOCK: a FIFO with no writer must be an error and not a hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise refusal(f"{path} is not a regular file", "replace it with one")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(MAX_ACCOUNT_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise refusal(f"cannot read {path}: {error.strerror}", hint) from error
    if len(data) > MAX_ACCOUNT_FILE_BYTES:
        raise refusal(f"{path} is too large", f"at most {MAX_ACCOUNT_FILE_BYTES} bytes")
    return data


def image_user(files: AccountFiles, text: str, needs_primary: bool) -> User:
    """The user part of a declaration. A number needs no account, unless its primary group is needed. Raises `ConfineError`."""
    if not text:
        raise refusal(
            "OCI USER is required because run_as_user is omitted", "give the image a USER, or the policy a run_as_user"
        )
    check_component(text, "the user of the image's USER")
    account = None
    if not is_number(text):
        account = files.account(text)
        if account is None:
            raise refusal(
                f"user {text!r} of the image's USER is not in {files.passwd}", "create the account in the image"
            )
    elif needs_primary and int(text) != 0:
        account = files.account_of(int(text))
        if account is None:
            raise refusal(
                "a numeric image USER without a group needs a passwd entry for its primary group",
                "write USER as uid:gid",
            )
    uid = int(text) if account is None else account.uid
    if uid == 0 or text == "root" or (needs_primary and account is not None and account.gid == 0):
        raise refusal(
            f"the image's USER {text!r} is root, or in root's group",
            "declare an unprivileged USER, or set run_as_user and run_as_group",
        )
    if is_number(text):
        return User(number(text, "the image's USER"), text, gid=account.gid if account else None)
    assert account is not None
    return User(uid, text, account.home or f"/home/{text}", account.gid)


def with_groups(files: AccountFiles, user: User) -> User:
    """The user with the groups that list it by name; none list a number. Raises `ConfineError` for a member of group 0."""
    if is_number(user.name):
        return user
    listed = files.groups_listing(user.name)
    if 0 in listed:
        raise refusal(f"user {user.name!r} belongs to group 0", "take the user out of the root group")
    return replace(user, listed=listed)


def image_group(files: AccountFiles, text: str) -> int:
    """The gid of the group part of a declaration. Raises `ConfineError` for root's group and for one that is not there."""
    check_component(text, "the group of the image's USER")
    if is_number(text):
        return number(text, "the group of the image's USER")
    gid = files.group_named(text)
    if gid is None:
        raise refusal(f"group {text!r} of the image's USER is not in {files.group}", "create the group in the image")
    if gid == 0 or text == "root":
        raise refusal(f"group {text!r} of the image's USER is root's group", "declare an unprivileged group")
    return gid
