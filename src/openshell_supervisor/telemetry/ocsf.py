"""OCSF 1.8.0: its numbers, its classes and the objects that our events are made of.

Everything built here validates against the official schema with unknown attributes forbidden. That is stricter than
what the Rust supervisor writes: its events lack `type_id` on the device and the operating system, put `container`
where no class has it, leave 1007 without an actor and 4001 without an endpoint. Field values are otherwise the same,
product and vendor strings included, so that a consumer of its events reads ours. This module refuses to know why an
event is emitted (`events.py` does) and how a line looks (`shorthand.py` does).

Numbers and captions: schema.ocsf.io, version 1.8.0.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from openshell_supervisor import __version__

VERSION = "1.8.0"
PRODUCT_NAME = "OpenShell Sandbox Supervisor"
VENDOR_NAME = "OpenShell"
SUPERVISOR_PROCESS = "openshell-supervisor"
OTHER = 99

# One string of an event. Request heads are bounded at 64 KiB by the proxy; a reader of logs needs a small part of
# that, and log shippers cut lines at 16 KiB (containerd, Docker). Eight thousand characters is more than any honest
# path or reason.
TEXT_LIMIT = 8192
# How deep a process chain is written. The reference walks 64 ancestors at most; JSON readers limit nesting well above
# that.
ANCESTOR_LIMIT = 64
# Nesting of caller-supplied `unmapped` values; ours are one or two deep.
NESTING_LIMIT = 8

_SURROGATES = re.compile("[\ud800-\udfff]")


class Severity(IntEnum):
    """OCSF severity_id. Informational: allowed or succeeded. Low: oddities. Medium: denials and degraded controls.
    High: lost controls. Critical: killed by timeout."""

    INFORMATIONAL = 1
    LOW = 2
    MEDIUM = 3
    HIGH = 4
    CRITICAL = 5


SEVERITY_LABELS: Mapping[int, str] = {
    0: "Unknown",
    1: "Informational",
    2: "Low",
    3: "Medium",
    4: "High",
    5: "Critical",
    6: "Fatal",
    OTHER: "Other",
}
ACTION_IDS: Mapping[str, int] = {"Unknown": 0, "Allowed": 1, "Denied": 2, "Observed": 3, "Modified": 4, "Other": OTHER}
DISPOSITION_IDS: Mapping[str, int] = {
    "Unknown": 0,
    "Allowed": 1,
    "Blocked": 2,
    "Quarantined": 3,
    "Isolated": 4,
    "Deleted": 5,
    "Dropped": 6,
    "Custom Action": 7,
    "Approved": 8,
    "Restored": 9,
    "Exonerated": 10,
    "Corrected": 11,
    "Partially Corrected": 12,
    "Uncorrected": 13,
    "Delayed": 14,
    "Detected": 15,
    "No Action": 16,
    "Logged": 17,
    "Tagged": 18,
    "Alert": 19,
    "Count": 20,
    "Reset": 21,
    "Captcha": 22,
    "Challenge": 23,
    "Access Revoked": 24,
    "Rejected": 25,
    "Unauthorized": 26,
    "Error": 27,
    "Other": OTHER,
}
STATE_LABELS: Mapping[int, str] = {0: "Unknown", 1: "Disabled", 2: "Enabled", OTHER: "Other"}
SECURITY_LEVEL_IDS: Mapping[str, int] = {"Unknown": 0, "Secure": 1, "At Risk": 2, "Compromised": 3, "Other": OTHER}
CONFIDENCE_IDS: Mapping[str, int] = {"Unknown": 0, "Low": 1, "Medium": 2, "High": 3, "Other": OTHER}
HTTP_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})

# Device type 6 is "Virtual", operating system type 200 is "Linux".
_DEVICE_TYPE = {"type_id": 6, "type": "Virtual"}
_LINUX = {"name": "Linux", "type_id": 200, "type": "Linux"}
_OUTBOUND, _LOCAL = (2, "Outbound"), (4, "Local")


@dataclass(frozen=True, slots=True)
class EventClass:
    """One OCSF class as we use it: its numbers, the profiles an event of it declares, and its activities by name."""

    uid: int
    name: str
    category_uid: int
    category_name: str
    profiles: tuple[str, ...]
    activities: Mapping[str, int]


_TRAFFIC = {"Open": 1, "Close": 2, "Reset": 3, "Fail": 4, "Refuse": 5, "Traffic": 6, "Listen": 7}
_CONTROLLED = ("security_control", "container", "host")
_PROXIED = ("security_control", "network_proxy", "container", "host")

NETWORK = EventClass(4001, "Network Activity", 4, "Network Activity", _PROXIED, _TRAFFIC)
HTTP = EventClass(
    4002,
    "HTTP Activity",
    4,
    "Network Activity",
    _PROXIED,
    {"Connect": 1, "Delete": 2, "Get": 3, "Head": 4, "Options": 5, "Post": 6, "Put": 7, "Trace": 8, "Patch": 9},
)
SSH = EventClass(4007, "SSH Activity", 4, "Network Activity", _CONTROLLED, _TRAFFIC)
PROCESS = EventClass(
    1007,
    "Process Activity",
    1,
    "System Activity",
    _CONTROLLED,
    {"Launch": 1, "Terminate": 2, "Open": 3, "Inject": 4, "Set User ID": 5},
)
FINDING = EventClass(2004, "Detection Finding", 2, "Findings", _CONTROLLED, {"Create": 1, "Update": 2, "Close": 3})
LIFECYCLE = EventClass(
    6002,
    "Application Lifecycle",
    6,
    "Application Activity",
    ("container", "host"),
    {"Install": 1, "Remove": 2, "Start": 3, "Stop": 4, "Restart": 5, "Enable": 6, "Disable": 7, "Update": 8},
)
CONFIG = EventClass(5019, "Device Config State Change", 5, "Discovery", _CONTROLLED, {"Log": 1, "Collect": 2})
API = EventClass(
    6003,
    "API Activity",
    6,
    "Application Activity",
    ("container", "host"),
    {"Create": 1, "Read": 2, "Update": 3, "Delete": 4},
)
BASE = EventClass(0, "Base Event", 0, "Uncategorized", ("container", "host"), {})
CLASSES: Mapping[int, EventClass] = {
    item.uid: item for item in (NETWORK, HTTP, SSH, PROCESS, FINDING, LIFECYCLE, CONFIG, API, BASE)
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of a connection: a name, an address, a port, whichever are known."""

    host: str | None = None
    ip: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Process:
    """A process as a reader should see it. `name` is the resolved binary path, or "-"; `cmd_line` only ever holds what
    may be logged (absolute paths of argv, never values); `ancestors` are binary paths, the nearest first."""

    name: str
    pid: int
    cmd_line: str | None = None
    ancestors: tuple[str, ...] = ()


def _hostname() -> str:
    try:
        name = Path("/etc/hostname").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        name = ""
    return name or "openshell-sandbox"


@dataclass(frozen=True, slots=True)
class Context:
    """Who speaks: the sandbox, the machine, the release and where its proxy listens. Part of every event."""

    sandbox_id: str = ""
    sandbox_name: str = ""
    hostname: str = field(default_factory=_hostname)
    image: str = ""
    version: str = __version__
    proxy_ip: str = "127.0.0.1"
    proxy_port: int = 3128


def clean(text: str, limit: int = TEXT_LIMIT) -> str:
    """`text` made safe to encode: at most `limit` characters (then `...`), lone surrogates as U+FFFD.

    Paths and arguments of the workload arrive through `os.fsdecode`, which maps undecodable bytes to lone surrogates;
    these cannot be written as UTF-8, so a file name chosen by the agent could otherwise silence its own denial.
    """
    if len(text) <= limit and text.isprintable():
        return text
    if len(text) > limit:
        text = text[:limit] + "..."
    return _SURROGATES.sub("\ufffd", text)


def plain(value: object, depth: int = 0) -> Any:
    """`value` as JSON types: strings cleaned, mappings and sequences copied, anything else as its text."""
    if isinstance(value, str):
        return clean(str(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if depth < NESTING_LIMIT:
        if isinstance(value, Mapping):
            return {clean(str(key)): plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(item, depth + 1) for item in value]
    return clean(str(value))


def endpoint(value: Endpoint) -> dict[str, Any]:
    """A `network_endpoint` object. A user name before `@` is dropped, a port that cannot exist is left out, and what is
    no address stands as the name if there is none."""
    made: dict[str, Any] = {}
    if value.host:
        made["domain"] = clean(value.host.rpartition("@")[2])
    if value.ip:
        if _is_address(value.ip):
            made["ip"] = value.ip
        else:
            made.setdefault("domain", clean(value.ip))
    if value.port is not None and 0 <= value.port <= 65535:
        made["port"] = value.port
        if len(made) == 1:
            made["hostname"] = "unknown"  # a port alone does not identify an endpoint, says the schema
    return made


def _is_address(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):  # ValueError: a NUL or a character beyond ASCII
        return False
    return True


def process(value: Process) -> dict[str, Any]:
    """A `process` object; ancestors become a nested `parent_process` chain with pid 0, as their pids are not
    recorded."""
    made: dict[str, Any] = {"name": clean(value.name), "pid": value.pid}
    if value.cmd_line is not None:
        made["cmd_line"] = clean(value.cmd_line)
    inner = made
    for ancestor in value.ancestors[:ANCESTOR_LIMIT]:
        inner["parent_process"] = {"name": clean(ancestor), "pid": 0}
        inner = inner["parent_process"]
    return made


def connection_info(protocol: str, destination: Endpoint | None) -> dict[str, Any]:
    """A `network_connection_info` object; the schema asks for a direction, which is local only towards loopback."""
    local = bool(destination and (destination.ip or "").startswith(("127.", "::1")))
    direction_id, direction = _LOCAL if local else _OUTBOUND
    return {"protocol_name": clean(protocol), "direction_id": direction_id, "direction": direction}


def http_method(method: str) -> str:
    """One of the nine standard methods in upper case, anything else as it came (which the schema does not allow in
    `http_request`; see `Telemetry.http`)."""
    upper = method.upper()
    return upper if upper in HTTP_METHODS else clean(method)


def labelled(event: dict[str, Any], name: str, label: str, ids: Mapping[str, int]) -> None:
    """Set the pair `<name>_id` and `<name>`; a label that OCSF does not know gets id 99."""
    event[f"{name}_id"] = ids.get(label, OTHER)
    event[name] = label


def set_status(event: dict[str, Any], ok: bool | None) -> None:
    """Success, Failure, or no status at all for None."""
    if ok is not None:
        event["status_id"], event["status"] = (1, "Success") if ok else (2, "Failure")


class Envelope:
    """The part that every event of one context shares, built once per context and class.

    The nested objects (`metadata`, `device`) are shared between events: readers must not change what they are given.
    """

    def __init__(self, context: Context) -> None:
        self.product = {"name": PRODUCT_NAME, "vendor_name": VENDOR_NAME, "version": clean(context.version)}
        self.proxy_endpoint = endpoint(Endpoint(ip=context.proxy_ip, port=context.proxy_port))
        # What stands in where the schema asks for an endpoint and none is known; `shorthand` does not show it.
        self.nowhere = {"hostname": clean(context.hostname)}
        self.supervisor = {"process": {"name": SUPERVISOR_PROCESS, "pid": os.getpid()}}
        self._heads: dict[tuple[int, str], dict[str, Any]] = {}
        device = {"hostname": clean(context.hostname), **_DEVICE_TYPE, "os": _LINUX}
        if container := _container(context):
            device["container"] = container
        for item in CLASSES.values():
            metadata = {
                "version": VERSION,
                "product": self.product,
                "profiles": list(item.profiles),
                "uid": clean(context.sandbox_id),
            }
            for activity, number in item.activities.items():
                self._heads[item.uid, activity] = _head(item, number, activity, metadata, device)
            self._heads[item.uid, "Other"] = _head(item, OTHER, "Other", metadata, device)

    def event(self, item: EventClass, activity: str, severity: int, message: str) -> dict[str, Any]:
        """A new event with everything but the class's own fields. An activity that OCSF does not know gets id 99 and
        its own name. `time` is now, in milliseconds since the epoch."""
        head = self._heads.get((item.uid, activity))
        if head is not None:
            event = head.copy()
        else:
            event = self._heads[item.uid, "Other"].copy()
            event["activity_name"] = clean(activity)
            event["type_name"] = f"{item.name}: {event['activity_name']}"
        event["time"] = time.time_ns() // 1_000_000
        event["severity_id"] = int(severity)
        event["severity"] = SEVERITY_LABELS.get(severity, "Other")
        event["message"] = clean(message)
        return event


def _container(context: Context) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if context.sandbox_name:
        made["name"] = clean(context.sandbox_name)
    if context.sandbox_id:
        made["uid"] = clean(context.sandbox_id)
    if context.image:
        made = made or {"name": clean(context.hostname)}  # an image alone does not identify a container
        image = clean(context.image)
        # The schema requires a uid: the digest when the reference carries one, else the reference again.
        made["image"] = {"name": image, "uid": image.partition("@")[2] or image}
    return made


def _head(
    item: EventClass, activity_id: int, activity: str, metadata: dict[str, Any], device: dict[str, Any]
) -> dict[str, Any]:
    return {
        "class_uid": item.uid,
        "class_name": item.name,
        "category_uid": item.category_uid,
        "category_name": item.category_name,
        "activity_id": activity_id,
        "activity_name": activity,
        "type_uid": item.uid * 100 + activity_id,
        "type_name": f"{item.name}: {activity}",
        "metadata": metadata,
        "device": device,
    }
