"""A workload that says who it is and what it can read of others: prints one JSON object. Standard library only.

`privileges_inside.py YRANAC…`: besides its own status it names every process in whose /proc files it finds a canary. They are
given backwards, because command lines are looked at too.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys

SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def reading(path: str) -> bytes | str:
    """The first mebibyte of a file, or the name of the errno that says why not."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")


def outcome(path: str) -> str:
    """ "ok", or why not."""
    found = reading(path)
    return found if isinstance(found, str) else "ok"


def opening(path: str) -> str:
    """Whether a file can be opened at all: /proc/PID/mem has nothing at offset 0."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")
    return "ok"


def main(canaries: list[str]) -> None:
    """Look, and tell."""
    with open("/proc/self/status") as status:
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in status)}
    found: dict[str, list[str]] = {canary: [] for canary in canaries}
    readable = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        block = reading(f"/proc/{name}/environ")
        if isinstance(block, bytes):
            readable.append(int(name))
        text = b"".join(data for data in (block, reading(f"/proc/{name}/cmdline")) if isinstance(data, bytes))
        for canary in canaries:
            if canary.encode() in text:
                found[canary].append(name)
    supervisor = f"/proc/{os.getppid()}"
    answer = {
        "uid": [int(one) for one in fields["Uid"]],
        "gid": [int(one) for one in fields["Gid"]],
        "groups": sorted(int(one) for one in fields["Groups"]),
        "sets": {name: int(fields[name][0], 16) for name in SETS},
        "no_new_privs": fields["NoNewPrivs"] == ["1"],
        "core": list(resource.getrlimit(resource.RLIMIT_CORE)),
        "supervisor": {
            "environ": outcome(f"{supervisor}/environ"),
            "mem": opening(f"{supervisor}/mem"),
            "fd": _following(f"{supervisor}/fd/0"),
        },
        "readable": readable,
        "found": found,
        "own": {name: value for name, value in os.environ.items() if any(one in value for one in canaries)},
    }
    print(json.dumps(answer), flush=True)


def _following(path: str) -> str:
    try:
        os.readlink(path)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")
    return "ok"


if __name__ == "__main__":
    main([one[::-1] for one in sys.argv[1:]])
