"""One event as one line: the grammar that operators already grep for.

Pure: an event (a dict of JSON types) in, a line without time stamp and without newline out. It reads events of the
Rust supervisor and ours alike, and gives both the same line, trailing spaces included. Two things are ours. Whatever
could forge a second line or drive a terminal (CR, LF, every other control character but tab, Unicode line separators
and direction overrides) becomes a space in all nine classes; the original flattens two fields only. And an event that
was let through although policy denies it (action Observed, `status_code` "would_deny") shows its reason, as a denial
does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from openshell_supervisor.telemetry.ocsf import STATE_LABELS, http_method

Event = Mapping[str, Any]

# The mark of an event that observe mode let through although policy denies it.
WOULD_DENY = "would_deny"

# Byte limits of the grammar; text beyond them ends in "...".
REASON_BYTES = 256
MESSAGE_BYTES = 120
TITLE_BYTES = 120
CONTEXT_BYTES = 256
# How many `unmapped` items an EVENT line shows.
BASE_ITEMS = 3

_TAGS = {2: "[LOW]", 3: "[MED]", 4: "[HIGH]", 5: "[CRIT]", 6: "[FATAL]"}
_CONFIG_SUFFIXES = (
    ("auto", "auto"),
    ("source", "source"),
    ("prover_delta", "prover_delta"),
    ("resolved_from", "resolved_from"),
    ("policy_version", "version"),
    ("policy_hash", "hash"),
)
_SURROGATES = re.compile("[\ud800-\udfff]")
# C0 without tab, DEL, C1 (0x9b alone starts a terminal sequence), line and paragraph separator, direction overrides.
_FORGING = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_CONTEXT_SPECIAL = re.compile(r"[\\\[\]\s\x00-\x1f\x7f-\x9f]")
_QUOTED_SPECIAL = re.compile(r'[\\"\x00-\x1f\x7f-\x9f]')
_QUOTED_NAMES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def shorthand(event: Event) -> str:
    """The line of `event`, without time and newline. Raises `ValueError` for a class that is not one of the nine."""
    form = _FORMS.get(event.get("class_uid", -1))
    if form is None:
        raise ValueError(f"no one-line form for OCSF class {event.get('class_uid')!r}")
    return one_line(form(event))


def one_line(text: str) -> str:
    """`text` with everything that could end the line or steer a terminal replaced by a space; tab stays."""
    if text.isprintable():
        return text
    return _SURROGATES.sub("\ufffd", _FORGING.sub(" ", text))


def cut(text: str, limit: int) -> str:
    """`text` if it has at most `limit` UTF-8 bytes, else the longest prefix of whole characters that fits, and
    `...`."""
    if len(text) * 4 <= limit:
        return text
    data = text.encode("utf-8", "surrogatepass")
    if len(data) <= limit:
        return text
    return data[:limit].decode("utf-8", "ignore") + "..."


def _escape_context(text: str) -> str:
    return _CONTEXT_SPECIAL.sub(lambda found: _backslash(found[0], "\\[]"), text)


def _backslash(char: str, plain: str) -> str:
    return "\\" + char if char in plain else f"\\u{{{ord(char):x}}}"


def _escape_quoted(text: str) -> str:
    return _QUOTED_SPECIAL.sub(lambda found: _QUOTED_NAMES.get(found[0]) or f"\\u{{{ord(found[0]):x}}}", text)


def _tag(event: Event) -> str:
    return _TAGS.get(event.get("severity_id", 0), "[INFO]")


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ")


def _context_items(event: Event, without: str = "") -> list[str]:
    """`key:value` of each scalar in `unmapped`, sorted by key and escaped; null, arrays and objects are not shown, nor
    is the key `without`."""
    items = []
    for key, value in sorted((event.get("unmapped") or {}).items()):
        if key == without:
            continue
        if isinstance(value, str):
            shown = _escape_context(cut(value, CONTEXT_BYTES))
        elif isinstance(value, (bool, int, float)):
            shown = json.dumps(value)
        else:
            continue
        items.append(f"{_escape_context(key)}:{shown}")
    return items


def _action(event: Event) -> str:
    action: str | None = event.get("action")
    return f" {action.upper()}" if action else ""


def _actor(event: Event) -> str:
    process = (event.get("actor") or {}).get("process")
    return f"{process.get('name', '')}({process.get('pid', 0)})" if process else ""


def _endpoint(endpoint: Mapping[str, Any] | None) -> str:
    """`host[:port]`, or nothing where there is no endpoint, or only the host name that fills the schema's demand for
    one."""
    if endpoint is None:
        return ""
    host = endpoint.get("domain")
    if host is None:
        host = endpoint.get("ip")
    port = endpoint.get("port")
    if host is None and port is None and "hostname" in endpoint:
        return ""
    host = "unknown" if host is None else host
    return host if port is None else f"{host}:{port}"


def _rule(event: Event) -> str:
    rule = event.get("firewall_rule")
    return f" [policy:{rule.get('name', '-')} engine:{rule.get('type', '-')}]" if rule else ""


def _reason(event: Event) -> str:
    """The reason of a denial, or of what would have been one: `status_detail`, or the message where that is absent."""
    action = event.get("action")
    if action != "Denied" and not (action == "Observed" and event.get("status_code") == WOULD_DENY):
        return ""
    reason = event.get("status_detail")
    if reason is None:
        reason = event.get("message") or ""
    return cut(_flat(reason), REASON_BYTES)


def _message(event: Event) -> str:
    message = event.get("message")
    return f" [msg:{cut(_flat(message), MESSAGE_BYTES)}]" if message else ""


def _network(event: Event) -> str:
    action, rule, reason = _action(event), _rule(event), _reason(event)
    destination = _endpoint(event.get("dst_endpoint"))
    connection = event.get("connection_info")
    if destination and connection:
        destination += f"/{connection.get('protocol_name', '')}"
    who = " -> ".join(part for part in (_actor(event), destination) if part)
    line = f"NET:{event.get('activity_name', '').upper()} {_tag(event)}{action}{' ' + who if who else ''}{rule}"
    if reason:
        line += f" [reason:{reason}]"
    if not (action or who or rule or reason) or event.get("status_detail") == "transparent_tcp_allowed":
        line += _message(event)
    return line


def _url(request: Mapping[str, Any]) -> str:
    url = request.get("url")
    if url is None:
        return ""
    scheme, host, port = url.get("scheme", "https"), url.get("hostname", "unknown"), url.get("port")
    hidden = port is None or (scheme, port) in (("https", 443), ("http", 80))
    return f"{scheme}://{host}{'' if hidden else f':{port}'}{url.get('path', '/')}"


def _http(event: Event) -> str:
    request = event.get("http_request") or {}
    # A method that the schema's list lacks stands in `unmapped`; the line shows it in its usual place.
    method = request.get("http_method") or (event.get("unmapped") or {}).get("http_method", "UNKNOWN")
    method = http_method(method)
    action, actor, reason = _action(event), _actor(event), _reason(event)
    items = _context_items(event, without="http_method")
    if reason:
        items.append(f"reason:{reason}")
    line = (
        f"HTTP:{method} {_tag(event)}{action} {actor + ' -> ' if actor else ''}{method} {_url(request)}{_rule(event)}"
    )
    if items:
        line += f" [{' '.join(items)}]"
    if event.get("action") != "Denied" and (event.get("firewall_rule") or {}).get("type") == "l7-mcp":
        line += _message(event)
    return line


def _ssh(event: Event) -> str:
    source = _endpoint(event.get("src_endpoint"))
    auth = event.get("auth_type")
    line = f"SSH:{event.get('activity_name', '').upper()} {_tag(event)}{_action(event)}"
    return line + (f" {source}" if source else "") + (f" [auth:{auth}]" if auth else "")


def _process(event: Event) -> str:
    process = event.get("process") or {}
    name, pid = process.get("name", "unknown"), process.get("pid", 0)
    line = f"PROC:{event.get('activity_name', '').upper()} {_tag(event)} {name}({pid})"
    if (code := event.get("exit_code")) is not None:
        line += f" [exit:{code}]"
    if (command := process.get("cmd_line")) is not None:
        line += f" [cmd:{command}]"
    return line


def _finding(event: Event) -> str:
    what = (event.get("disposition") or event.get("activity_name", "")).upper()
    info = event.get("finding_info") or {}
    title = _escape_quoted(cut(info.get("title", ""), TITLE_BYTES))
    items = [f"type:{_escape_context(info.get('uid', ''))}", *_context_items(event)]
    if confidence := event.get("confidence"):
        items.append(f"confidence:{confidence.lower()}")
    return f'FINDING:{what} {_tag(event)} "{title}" [{" ".join(items)}]'


def _lifecycle(event: Event) -> str:
    name = (event.get("app") or {}).get("name", "")
    # The space before the status stays when there is none: readers of the original line expect it.
    return f"LIFECYCLE:{event.get('activity_name', '').upper()} {_tag(event)} {name} {event.get('status', '').lower()}"


def _config(event: Event) -> str:
    state = "UNKNOWN"
    if (state_id := event.get("state_id")) is not None:
        label = event.get("state")
        state = (STATE_LABELS.get(state_id, "Other") if label is None else label).upper()
    message = event.get("message")
    line = f"CONFIG:{state} {_tag(event)} {'config' if message is None else message}"
    unmapped = event.get("unmapped") or {}
    parts = [f"{shown}:{unmapped[key]}" for key, shown in _CONFIG_SUFFIXES if isinstance(unmapped.get(key), str)]
    return f"{line} [{' '.join(parts)}]" if parts else line


def _api(event: Event) -> str:
    line = f"API:INFERENCE {_tag(event)}"
    if status := event.get("status"):
        line += f" {status}"
    if model := event.get("ai_model"):
        name, provider = (_escape_context(cut(model.get(key, ""), CONTEXT_BYTES)) for key in ("name", "ai_provider"))
        line += f" {name} via {provider}"
    latency = (event.get("unmapped") or {}).get("latency_ms")
    if isinstance(latency, int) and not isinstance(latency, bool) and latency >= 0:
        line += f" {latency}ms"
    operation = (event.get("api") or {}).get("operation", "")
    return f"{line} [{_escape_context(cut(operation, CONTEXT_BYTES))}]"


def _base(event: Event) -> str:
    line = f"EVENT {_tag(event)} {event.get('message', '')}"
    items = [
        f"{key}:{value if isinstance(value, str) else json.dumps(value, separators=(',', ':'), ensure_ascii=False)}"
        for key, value in sorted((event.get("unmapped") or {}).items())[:BASE_ITEMS]
    ]
    return f"{line} [{' '.join(items)}]" if items else line


_FORMS: Mapping[int, Callable[[Event], str]] = {
    4001: _network,
    4002: _http,
    4007: _ssh,
    1007: _process,
    2004: _finding,
    6002: _lifecycle,
    5019: _config,
    6003: _api,
    0: _base,
}
