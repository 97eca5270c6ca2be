"""What is legal and probably not meant. Upstream loads these in silence, or with a log line; here each is a warning.

A warning says what the policy does as written and what would do what was probably meant. It never changes the policy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from openshell_supervisor.errors import Problem
from openshell_supervisor.policy.globs import HOST, PATH, VALUE, glob_problem
from openshell_supervisor.policy.lint_files import file_warnings, landlock_warnings
from openshell_supervisor.policy.model import ACCESS_PRESETS, Endpoint, L7Match, NetworkRule, SandboxPolicy
from openshell_supervisor.policy.reading import child, nearest, shown

HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "*")
WEBSOCKET_METHODS = ("GET", "WEBSOCKET_TEXT", "*")
TLS_PORTS = (443, 8443)


def warnings_of(policy: SandboxPolicy) -> list[Problem]:
    """Every warning, in the order of the document's sections. The policy is as written, presets not expanded."""
    found: list[Problem] = []
    if policy.version != 1:
        found.append(
            Problem(
                "version",
                f"version is {policy.version}; only version 1 is known, and it is read as that",
                "version",
                hint="write `version: 1`",
            )
        )
    if policy.filesystem:
        found.extend(file_warnings(policy.filesystem))
    if policy.landlock:
        found.extend(landlock_warnings(policy.landlock))
    for key, rule in policy.network_policies.items():
        path = child("network_policies", key)
        found.extend(_rule_warnings(rule, path))
        for index, endpoint in enumerate(rule.endpoints):
            found.extend(_endpoint_warnings(endpoint, f"{path}.endpoints[{index}]"))
    return found


def _meant(word: str, known: tuple[str, ...]) -> str:
    guess = nearest(word, known)
    return f"did you mean `{guess}`?" if guess else f"known: {', '.join(known)}"


def _rule_warnings(rule: NetworkRule, path: str) -> Iterator[Problem]:
    if not rule.endpoints:
        yield Problem(
            "no_endpoints", "the rule has no endpoints and allows nothing", path, hint="add `endpoints: [...]`"
        )
    if not rule.binaries:
        yield Problem(
            "no_binaries",
            "the rule lists no binaries; where the calling program is identified, it matches no program and allows nothing",
            path,
            hint='to allow every program write `binaries: [{path: "/**"}]`',
        )
    for index, binary in enumerate(rule.binaries):
        where = f"{path}.binaries[{index}].path"
        if not binary.path.startswith("/") and not binary.path.startswith("*"):
            yield Problem(
                "binary_path",
                f"binary '{shown(binary.path)}' is not an absolute path and matches no program",
                where,
                hint=f"for example `/usr/bin/{shown(binary.path.rsplit('/', 1)[-1])}`",
            )
        elif "*" not in binary.path and any(c in binary.path for c in "?[{"):
            yield Problem(
                "binary_path",
                f"binary '{shown(binary.path)}' has no `*`, so `?`, `[` and `{{` in it are literal",
                where,
            )
        elif "*" in binary.path:
            yield from _bad_glob(binary.path, PATH, where)


def _endpoint_warnings(e: Endpoint, path: str) -> Iterator[Problem]:
    yield from _protocol_warnings(e, path)
    yield from _word_warnings(e, path)
    yield from _host_warnings(e, path)
    yield from _ignored_warnings(e, path)
    for index, entry in enumerate(e.allowed_ips):
        yield from _allowed_ip_warnings(entry, f"{path}.allowed_ips[{index}]")
    if e.inspected:
        if e.path and e.path != "**":
            yield from _bad_glob(e.path, PATH, f"{path}.path")
        for index, rule in enumerate(e.rules):
            yield from _match_warnings(e, rule, f"{path}.rules[{index}].allow", "allow rule")
        for index, deny in enumerate(e.deny_rules):
            yield from _match_warnings(e, deny, f"{path}.deny_rules[{index}]", "deny rule")
    elif e.access or e.rules or e.enforcement or e.path:
        written = [name for name in ("access", "rules", "enforcement", "path") if getattr(e, name)]
        yield Problem(
            "l7_without_protocol",
            f"{' and '.join(written)} {'have' if len(written) > 1 else 'has'} no effect without a protocol: "
            "every request to this endpoint is allowed",
            f"{path}.{written[0]}",
            hint="add `protocol: rest` to have requests inspected",
        )


def _protocol_warnings(e: Endpoint, path: str) -> Iterator[Problem]:
    """Protocols are told apart in any case, and most of their rules in lower case only; upstream says nothing of it."""
    protocol = e.protocol.lower()
    effect = {
        "mcp": "every call to this endpoint is denied",
        "json-rpc": "every call to this endpoint is denied",
        "graphql": "an `access` preset gets the rules of rest and denies every operation",
        "websocket": "an `access` preset gets the rules of rest, which deny messages",
    }.get(protocol)
    if effect is not None and e.protocol != protocol:
        yield Problem(
            "protocol_case",
            f"protocol '{shown(e.protocol)}' is not in lower case: it is accepted, and {effect}",
            f"{path}.protocol",
            hint=f"write `protocol: {protocol}`",
        )


def _word_warnings(e: Endpoint, path: str) -> Iterator[Problem]:
    if e.inspected and not e.enforcement:
        yield Problem(
            "enforcement_unset",
            "enforcement is not written, which means audit: requests that the rules do not allow are logged and let through",
            path,
            hint="write `enforcement: enforce` to block them, or `enforcement: audit` to say that this is meant",
        )
    elif e.enforcement not in ("", "enforce", "audit"):
        word = e.enforcement.strip().lower()
        blocks = word in ("enforced", "enforcing", "block", "deny", "strict", "on", "true") or nearest(
            word, ("enforce",)
        )
        yield Problem(
            "enforcement_unknown",
            f"enforcement '{shown(e.enforcement)}' means audit: requests that the rules do not allow are let through",
            f"{path}.enforcement",
            hint="did you mean `enforce`? It is compared exactly" if blocks else "known: enforce, audit",
        )
    if e.tls in ("terminate", "passthrough"):
        hint = "remove the line" if e.tls == "terminate" else "to leave TLS alone write `tls: skip`"
        yield Problem("tls_deprecated", f"'tls: {e.tls}' is deprecated and means automatic", f"{path}.tls", hint=hint)
    elif e.tls not in ("", "skip"):
        yield Problem(
            "tls_unknown",
            f"tls '{shown(e.tls)}' means automatic; only `skip` has an effect",
            f"{path}.tls",
            hint="to leave TLS alone write `tls: skip`",
        )
    if e.tls_skip and e.inspected:
        port = next((port for port in e.ports if port in TLS_PORTS), e.ports[0] if e.ports else 0)
        yield Problem(
            "tls_skip_l7",
            f"'tls: skip' with L7 rules on port {port}: requests inside TLS are not seen, so the rules do not apply to them",
            f"{path}.tls",
            hint="remove `tls: skip` to have the rules enforced, or remove the rules",
        )
    if e.access and e.access not in ACCESS_PRESETS:
        guess = nearest(e.access, ACCESS_PRESETS) or {
            "readonly": "read-only",
            "ro": "read-only",
            "read": "read-only",
            "rw": "read-write",
            "write": "read-write",
            "all": "full",
        }.get(e.access.lower(), "")
        yield Problem(
            "access_unknown",
            f"unsupported L7 access preset '{shown(e.access)}' ignored; expected one of: read-only, read-write, full; "
            "the endpoint allows no request",
            f"{path}.access",
            hint=f"did you mean `{guess}`?" if guess else "",
        )


def _ignored_warnings(e: Endpoint, path: str) -> Iterator[Problem]:
    """Keys that another protocol would read."""
    protocol = e.protocol.lower()
    graphql = e.persisted_queries or e.graphql_persisted_queries or e.graphql_max_body_bytes
    if graphql and protocol not in ("graphql", "websocket"):
        text = "GraphQL-specific endpoint fields are ignored unless protocol is graphql or websocket"
        yield Problem("ignored_field", text, path, hint="remove them, or set the protocol")
    if e.json_rpc_max_body_bytes and protocol not in ("json-rpc", "mcp"):
        text = "JSON-RPC-specific endpoint fields are ignored unless protocol is json-rpc or mcp"
        yield Problem("ignored_field", text, path, hint="remove them, or set the protocol")
    if e.request_body_credential_rewrite and protocol != "rest":
        text = "request_body_credential_rewrite is ignored unless protocol is rest"
        yield Problem("ignored_field", text, f"{path}.request_body_credential_rewrite", hint="add `protocol: rest`")
    if e.websocket_credential_rewrite and protocol not in ("rest", "websocket"):
        text = "websocket_credential_rewrite is ignored unless protocol is rest or websocket"
        yield Problem("ignored_field", text, f"{path}.websocket_credential_rewrite", hint="add `protocol: websocket`")


def _host_warnings(e: Endpoint, path: str) -> Iterator[Problem]:
    where = f"{path}.host"
    if e.host.endswith("."):
        yield Problem(
            "host_trailing_dot",
            f"host '{shown(e.host)}' ends with a dot and matches no ordinary request",
            where,
            hint=f"write `{shown(e.host.rstrip('.'))}`",
        )
    if not e.host.isascii():
        yield Problem(
            "host_not_ascii",
            f"host '{shown(e.host)}' is not ASCII and matches no request",
            where,
            hint="write the `xn--` form of the name",
        )
    if "*" in e.host:
        yield from _bad_glob(e.host, HOST, where)
    elif any(c in e.host for c in "?{}") or ("[" in e.host):
        yield Problem(
            "host_literal", f"host '{shown(e.host)}' has no `*`, so the other glob characters in it are literal", where
        )
    if not e.host and e.allowed_ips:
        yield Problem(
            "hostless",
            "the endpoint has no host: every name whose address is in allowed_ips is allowed",
            path,
            hint="add `host` if one name is meant",
        )


def _allowed_ip_warnings(entry: str, where: str) -> Iterator[Problem]:
    """Upstream finds these at connection time, and then refuses every connection of the endpoint."""
    try:
        network = ipaddress.ip_network(entry.strip(), strict=False)
    except ValueError:
        yield Problem(
            "allowed_ips_invalid",
            f"invalid CIDR/IP in allowed_ips: {shown(entry)}; every connection through this endpoint will be refused",
            where,
            hint="write an address or a network such as 10.0.0.0/8",
        )
        return
    blocked = (
        "127.0.0.0/8",
        "169.254.0.0/16",
        "0.0.0.0/32",
        "::1/128",
        "::/128",
        "fe80::/10",
        "::ffff:127.0.0.0/104",
        "::ffff:169.254.0.0/112",
        "::ffff:0.0.0.0/128",
    )
    if any(
        network.version == (other := ipaddress.ip_network(text)).version and network.overlaps(other) for text in blocked
    ):
        yield Problem(
            "allowed_ips_blocked",
            f"allowed_ips entry {shown(entry)} falls within always-blocked range (loopback/link-local/unspecified); "
            "every connection through this endpoint will be refused",
            where,
            hint="leave those ranges out; they are never reachable",
        )


def _match_warnings(e: Endpoint, rule: L7Match, path: str, kind: str) -> Iterator[Problem]:
    protocol = e.protocol.lower()
    if protocol in ("json-rpc", "mcp"):
        if not rule.method and not (e.mcp and e.mcp.allow_all_known_mcp_methods):
            text = f"the {kind} has no method and {'denies' if kind == 'deny rule' else 'allows'} nothing"
            add = "tools/call" if rule.params else '"*"'
            yield Problem("rule_inert", text, path, hint=f"add `method: {add}`")
        return
    graphql = bool(rule.operation_type or rule.operation_name or rule.fields)
    if protocol in ("rest", "sql") and graphql:
        yield Problem("graphql_fields", "GraphQL rule fields are ignored unless protocol is graphql or websocket", path)
    if protocol == "rest" and rule.command:
        yield Problem("command", "command is for SQL protocol, not REST", path)
    if protocol in ("rest", "websocket") and not graphql and (not rule.method or not rule.path):
        missing = " and ".join(name for name in ("method", "path") if not getattr(rule, name))
        effect = "denies nothing" if kind == "deny rule" else "allows nothing"
        add = ", ".join(
            f"`{name}: {example}`"
            for name, example in (("method", '"*"'), ("path", '"/**"'))
            if not getattr(rule, name)
        )
        yield Problem("rule_inert", f"the {kind} has no {missing} and {effect}", path, hint=f"add {add} to match all")
    if rule.method and protocol in ("rest", "graphql", "websocket"):
        known = WEBSOCKET_METHODS if protocol == "websocket" else HTTP_METHODS
        if rule.method.upper() not in known:
            yield Problem(
                "method_unknown",
                f"Unknown HTTP/WebSocket method '{shown(rule.method)}'. Standard methods: {', '.join(known)}.",
                f"{path}.method",
                hint="methods have no wildcards but `*` alone; one rule per method"
                if "*" in rule.method or "," in rule.method or "|" in rule.method
                else _meant(rule.method, known),
            )
    if rule.path:
        yield from _path_warnings(rule.path, f"{path}.path")
    for key, matcher in rule.query:
        for pattern in matcher.globs:
            yield from _bad_glob(pattern, VALUE, child(f"{path}.query", key))


def _path_warnings(pattern: str, where: str) -> Iterator[Problem]:
    if "?" in pattern and "=" in pattern.split("?", 1)[1]:
        yield Problem(
            "path_query",
            f"path '{shown(pattern)}' seems to have a query string; paths are compared without it",
            where,
            hint="move it to `query: {key: value}`",
        )
    elif not pattern.startswith(("/", "*", "{", "[", "?", "\\")):
        hint = f"write `/{shown(pattern)}`"
        if "://" in pattern:
            hint = "write the path alone; the host belongs to the endpoint"
        elif pattern.startswith("^"):
            hint = "paths are globs, not regular expressions: `*` is anything within a segment, `/**` all below"
        text = f"path '{shown(pattern)}' does not begin with '/' and matches no request"
        yield Problem("rule_path_relative", text, where, hint=hint)
    yield from _bad_glob(pattern, PATH, where)


def _bad_glob(pattern: str, delimiters: tuple[str, ...], where: str) -> Iterator[Problem]:
    fault = glob_problem(pattern, delimiters)
    if fault:
        yield Problem(
            "glob_invalid",
            f"glob pattern '{shown(pattern)}' has {fault}; a request that comes to it is denied",
            where,
            hint="put a backslash before a literal [ or {",
        )
