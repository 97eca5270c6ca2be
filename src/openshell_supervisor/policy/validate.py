"""What makes a policy unusable: upstream's checks (A) of the whole policy, on the model (policy.md 1.7).

Texts are upstream's, word for word, because gateways and people search for them. Every fault is reported, each with the
dotted path it concerns; places in the file are added by the caller. What an endpoint's request rules may say is checked in
`policy.validate_l7`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy.model import Endpoint, ProcessPolicy, SandboxPolicy
from openshell_supervisor.policy.normalise import normal_path
from openshell_supervisor.policy.overlap import overlap_problems
from openshell_supervisor.policy.reading import child, shown
from openshell_supervisor.policy.validate_l7 import l7_problems
from openshell_supervisor.policy.validate_middleware import middleware_problems

MAX_PATHS = 256
MAX_PATH_BYTES = 4096
MAX_NAMED_PATH_BYTES = 77
"""Upstream's limits of the filesystem section, and how much of a path that is too long it shows."""
MAX_ID = 2**32 - 2
"""The largest numeric user or group; 4294967295 is the kernel's "no change"."""
_SIGNING = ("sigv4", "sigv4:body", "sigv4:no_body")
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\Z")


def problems_of(policy: SandboxPolicy, *, files: bool = False) -> list[Problem]:
    """Every fault of the policy, in the order of the document's sections; with `files` in the terms of upstream's file loader."""
    found = [*_process_problems(policy.process or ProcessPolicy()), *_filesystem_problems(policy)]
    for key, rule in policy.network_policies.items():
        path = child("network_policies", key)
        for index, endpoint in enumerate(rule.endpoints):
            found.extend(_endpoint_problems(rule.name or key, endpoint, f"{path}.endpoints[{index}]", files=files))
            found.extend(l7_problems(rule.name or key, key, index, endpoint, f"{path}.endpoints[{index}]", files=files))
    found.extend(overlap_problems(policy))
    found.extend(middleware_problems(policy))
    return found


def _process_problems(process: ProcessPolicy) -> Iterator[Problem]:
    for name, value in (("run_as_user", process.run_as_user), ("run_as_group", process.run_as_group)):
        numeric = value.isascii() and value.isdigit() and len(value) <= 10 and 1 <= int(value) <= MAX_ID
        if value in ("", "sandbox") or numeric:
            continue
        hint = (
            "root is not allowed; use 'sandbox' or a number such as '1000'"
            if value in ("0", "root")
            else "other names are not looked up"
        )
        yield Problem(
            "bad_identity",
            f"{name} must be 'sandbox' or a numeric UID/GID in range [1, {MAX_ID}], got '{shown(value)}'",
            f"process.{name}",
            hint=hint,
        )


def _filesystem_problems(policy: SandboxPolicy) -> Iterator[Problem]:
    section = policy.filesystem
    if section is None:
        return
    total = len(section.read_only) + len(section.read_write)
    if total > MAX_PATHS:
        yield Problem(
            "too_many_paths",
            f"too many filesystem paths ({total} > {MAX_PATHS})",
            "filesystem_policy",
            hint="list directories, not the files in them",
        )
    for name, paths in (("read_only", section.read_only), ("read_write", section.read_write)):
        for index, value in enumerate(paths):
            yield from _path_problems(value, f"filesystem_policy.{name}[{index}]", name == "read_write")


def _path_problems(value: str, path: str, writable: bool) -> Iterator[Problem]:
    size = len(value.encode("utf-8", "surrogatepass"))
    if size > MAX_PATH_BYTES:
        cut = value.encode("utf-8", "surrogatepass")[:MAX_NAMED_PATH_BYTES].decode("utf-8", "ignore") + "..."
        yield Problem("path_too_long", f"path exceeds maximum length ({size} > {MAX_PATH_BYTES}): {cut}", path)
        return
    if not value.startswith("/"):
        hint = "`~` and variables are not expanded" if value[:1] in ("~", "$") else "there is no working directory here"
        yield Problem("path_not_absolute", f"path must be absolute (start with '/'): {shown(value)}", path, hint=hint)
    if ".." in value.split("/"):
        yield Problem(
            "path_traversal",
            f"path contains '..' traversal component: {shown(value)}",
            path,
            hint="write the path it comes to",
        )
    if writable and normal_path(value) == "/":  # upstream lets `/.` through
        yield Problem(
            "path_too_broad",
            f"read-write path is overly broad: {shown(value)}",
            path,
            hint="name the directories that the workload writes to",
        )


def _endpoint_problems(name: str, endpoint: Endpoint, path: str, *, files: bool) -> Iterator[Problem]:
    say = f"network policy '{shown(name)}'"
    host = shown(endpoint.host)
    if not endpoint.host and not endpoint.allowed_ips:
        yield Problem(
            "host_missing",
            f"{say}: endpoint host must not be empty unless allowed_ips constrains a non-TCP proxy endpoint",
            path,
            hint="write `host: name.example.com`; for every host there is no word, on purpose",
        )
    if endpoint.protocol.lower() == "tcp":
        yield from _tcp_problems(say, endpoint, path)
    if not endpoint.ports:
        yield Problem(
            "port_missing",
            f"{say}: endpoint '{host}' must declare at least one port",
            path,
            hint="write `port: 443` for HTTPS, or `ports: [80, 443]`",
        )
    for port in endpoint.ports:
        if not 1 <= port <= 65535:
            yield Problem("port_invalid", f"{say}: endpoint '{host}' has invalid port {port}; expected 1..=65535", path)
    yield from host_problems(say, endpoint.host, f"{path}.host", files=files)
    yield from _signing_problems(say, endpoint, path)


def host_problems(say: str, host: str, path: str, *, files: bool = False) -> Iterator[Problem]:
    """What is wrong with a host pattern, or with a host that can never match a request."""
    shape = _host_shape_problem(host)
    if shape:
        yield Problem("host_invalid", f"{say}: endpoint '{shown(host)}' is not a host: {shape[0]}", path, hint=shape[1])
        return
    if "*" not in host:
        return
    labels = host.split(".")
    if host.startswith(("*.", "**.")) and len(labels) <= 2:
        yield Problem(
            "host_tld_wildcard",
            f"{say}: TLD wildcard '{shown(host)}' is not allowed; use subdomain wildcards like '*.example.com' instead",
            path,
        )
        return
    bad_double = any("**" in label and (label != "**" or index) for index, label in enumerate(labels))
    bad_middle = any("*" in label and label not in ("*", "**") for label in labels[1:])
    if host in ("*", "**") or bad_double or bad_middle:
        yield Problem(
            "host_wildcard",
            f"{say}: {_wildcard_fault(host, double=bad_double, files=files)}",
            path,
            hint="no pattern means every host; write the hosts that are needed, one endpoint each"
            if host in ("*", "**")
            else "for example '*.example.com' (one label) or '**.example.com' (one or more)",
        )
    elif len(labels) <= 2:
        yield Problem(
            "host_tld_wildcard",
            f"{say}: TLD wildcard '{shown(host)}' is not allowed; use subdomain wildcards like '*.example.com' instead",
            path,
        )


def _wildcard_fault(host: str, *, double: bool, files: bool) -> str:
    """Upstream's words for a wildcard in a place where none may be: a gateway has one text, the file loader three."""
    if not files:
        return (
            f"invalid host wildcard '{shown(host)}'; middle DNS label wildcards must be the entire label '*' "
            "and recursive '**' is only allowed as the entire first label"
        )
    if host in ("*", "**"):
        return f"host wildcard '{host}' matches all hosts; use specific patterns like '*.example.com'"
    if double:
        return f"recursive host wildcard '**' is only allowed as the entire first DNS label, got '{shown(host)}'"
    return f"middle DNS label wildcard must be the entire label '*', got '{shown(host)}'"


def _host_shape_problem(host: str) -> tuple[str, str] | None:
    """Hosts that no request can have, each with what was meant. Upstream loads them and they match nothing."""
    if "://" in host:
        return (
            "it is a URL",
            f"write `host: {shown(host.split('://', 1)[1].split('/')[0].split(':')[0])}`; the port goes into `port`",
        )
    if "/" in host:
        return "it has a path or a prefix length", "paths go into `rules` or `path`, networks into `allowed_ips`"
    if host.startswith("[") and host.endswith("]"):
        return "an IPv6 address is written without brackets here", f'write `host: "{shown(host[1:-1])}"`'
    if host.count(":") == 1:
        name, _, port = host.partition(":")
        return "it has a port in it", f"write `host: {shown(name)}` and `port: {shown(port)}`"
    if any(c.isspace() for c in host):
        return "it has white space in it", "one host per endpoint, without spaces"
    return None


def _tcp_problems(say: str, endpoint: Endpoint, path: str) -> Iterator[Problem]:
    host = endpoint.host
    if not host:
        if endpoint.allowed_ips:
            yield Problem(
                "tcp_host",
                f"{say}: protocol tcp requires a DNS hostname; "
                "hostless allowed_ips endpoints are supported only by the forward proxy",
                path,
                hint="leave out `protocol` to use the address through the proxy",
            )
        return
    if is_address(host):
        yield Problem(
            "tcp_host",
            f"{say}: protocol tcp endpoint '{shown(host)}' must use a DNS hostname, not an IP literal; "
            "direct IP connections bypass policy DNS and are blocked",
            f"{path}.host",
        )
        return
    fault = _dns_fault(host)
    if fault:
        yield Problem(
            "tcp_host",
            f"{say}: protocol tcp endpoint has invalid DNS host selector '{shown(host)}': {fault}",
            f"{path}.host",
        )


def _dns_fault(host: str) -> str:
    if host != host.strip():
        return "leading or trailing whitespace is not allowed"
    if host.endswith("."):
        return "omit the trailing DNS root dot"
    name = host.replace("**", "x").replace("*", "x")
    if len(name) > 253 or not all(_LABEL.match(label) for label in name.split(".")):
        return "selector cannot represent a valid DNS name: a label is empty, too long or has characters that a name cannot have"
    return ""


def is_address(host: str) -> bool:
    """True for the text of an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _signing_problems(say: str, endpoint: Endpoint, path: str) -> Iterator[Problem]:
    signing, host = endpoint.credential_signing, shown(endpoint.host)
    if not signing:
        return
    if signing not in _SIGNING:
        yield Problem(
            "signing_unknown",
            f"{say}: endpoint '{host}' has unrecognized credential_signing value '{shown(signing)}' "
            "(expected sigv4, sigv4:body, or sigv4:no_body)",
            f"{path}.credential_signing",
        )
    if not endpoint.signing_service:
        yield Problem(
            "signing_service",
            f"{say}: endpoint '{host}' has credential_signing set but signing_service is empty",
            f"{path}.credential_signing",
            hint="for example `signing_service: bedrock`",
        )
    if endpoint.request_body_credential_rewrite:
        yield Problem(
            "signing_conflict",
            f"{say}: endpoint '{host}' has both credential_signing and request_body_credential_rewrite set; "
            "these options are mutually exclusive",
            f"{path}.credential_signing",
        )
