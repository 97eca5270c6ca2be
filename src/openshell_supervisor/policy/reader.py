"""A document tree to the model, strictly: upstream's keys and types, and nothing else.

Every struct refuses unknown keys, as upstream's reader does; all faults are collected in the `Reading`. What is not yet
enforced is still read into the model (`policy.not_built` names it). No meaning is checked here; `policy.validate` does that.
"""

from __future__ import annotations

from dataclasses import replace

from openshell_supervisor.policy.document import Listing, Node, Scalar, Table
from openshell_supervisor.policy.file_matcher import read_file_matcher
from openshell_supervisor.policy.model import (
    Binary,
    CredentialBinding,
    Endpoint,
    FilesystemPolicy,
    GraphqlOperation,
    L7Allow,
    L7Deny,
    LandlockPolicy,
    Matchers,
    McpOptions,
    Middleware,
    Netlink,
    NetworkOptions,
    NetworkRule,
    ProcessPolicy,
    QueryMatcher,
    SandboxPolicy,
)
from openshell_supervisor.policy.reading import Reading, child, nearest, shown

TOP = ("version", "filesystem_policy", "landlock", "process", "network_policies", "network_middlewares", "network")
ENDPOINT = (
    "host",
    "port",
    "ports",
    "protocol",
    "tls",
    "enforcement",
    "access",
    "rules",
    "allowed_ips",
    "deny_rules",
    "allow_encoded_slash",
    "persisted_queries",
    "graphql_persisted_queries",
    "graphql_max_body_bytes",
    "path",
    "websocket_credential_rewrite",
    "request_body_credential_rewrite",
    "credential_signing",
    "signing_service",
    "signing_region",
    "json_rpc",
    "mcp",
    "credential_binding",
    "allow_uninspected_credentials",
)
L7 = ("method", "path", "command", "query", "operation_type", "operation_name", "fields", "params", "tool")
U16, U32, I32 = 2**16 - 1, 2**32 - 1, 2**31 - 1

_TOP_MOVED = {
    "filesystem": "the section is called `filesystem_policy` in a file",
    "policies": "the section is called `network_policies`",
    "endpoints": "endpoints belong under a named rule: `network_policies: {my-rule: {endpoints: [...]}}`",
    "allow_netlink": "it belongs under `network`",
    "run_as_user": "it belongs under `process`",
    "run_as_group": "it belongs under `process`",
    "read_only": "it belongs under `filesystem_policy`",
    "read_write": "it belongs under `filesystem_policy`",
}
_NETWORK_RULES = "rules belong under `network_policies`: `network_policies: {my-rule: {endpoints: [...]}}`"
_NETLINK_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "1", "all", "any", "allow", "allowed"), "write `true`, without quotes"),
    **dict.fromkeys(("false", "no", "off", "0", "none", "deny", "denied"), "write `false`, without quotes"),
}
_RULE_MOVED = {
    "host": "host and port belong in an entry of `endpoints`: `endpoints: [{host: ..., port: ...}]`",
    "port": "host and port belong in an entry of `endpoints`: `endpoints: [{host: ..., port: ...}]`",
    "rules": "`rules` belongs in an entry of `endpoints`, beside `host` and `protocol: rest`",
    "access": "`access` belongs in an entry of `endpoints`, beside `host` and `protocol: rest`",
    "endpoint": "it is a list and called `endpoints`",
    "binary": "it is a list and called `binaries`",
}
_ENDPOINT_MOVED = {
    "method": "methods belong under `rules`: `rules: [{allow: {method: GET, path: /**}}]`",
    "methods": "methods belong under `rules`: `rules: [{allow: {method: GET, path: /**}}]`, one entry per method",
    "paths": "paths belong under `rules`: `rules: [{allow: {method: GET, path: /**}}]`",
    "allow": "`allow` belongs under `rules`: `rules: [{allow: {method: GET, path: /**}}]`",
    "deny": "write `deny_rules: [{method: DELETE, path: /**}]`",
    "binaries": "`binaries` belongs to the rule, beside `endpoints`",
    "advisor_proposed": "this mark is the gateway's; a file may not set it",
    "provider_credentialed": "this mark is the gateway's; a file may not set it",
    "hosts": 'one `host` per endpoint; write one entry for each, or a wildcard such as "*.example.com"',
    "url": "write `host` and `port`, and a path under `rules`",
    "scheme": "there is no scheme: `port` says where, and TLS is recognised by itself",
}
_ALLOW_MOVED = dict.fromkeys(
    ("method", "path", "query", "tool", "params", "operation_type"), "wrap it: `- allow: {method: GET, path: /x}`"
) | {"deny": "denials go into `deny_rules` of the endpoint, without a wrapper"}
_DENY_MOVED = {
    "deny": "entries of `deny_rules` are flat: `- {method: DELETE, path: /**}`",
    "allow": "entries of `deny_rules` are flat and deny: `- {method: DELETE, path: /**}`",
}
_PORTS = {
    "http": 80,
    "https": 443,
    "tls": 443,
    "ssh": 22,
    "postgres": 5432,
    "postgresql": 5432,
    "mysql": 3306,
    "redis": 6379,
}
_EMPTY_LISTS = {
    "rules": "rules list cannot be empty (would deny all traffic). Use `access: full` or remove rules.",
    "deny_rules": "deny_rules list cannot be empty (would have no effect). Remove it if no denials are needed.",
}
_ALLOW_FORM = "write `- allow: {method: GET, path: /x}`, one entry for each"
_EXPECT_RULE = "write the rules of a policy as a mapping: `my-rule: {endpoints: [...]}`"


def read_policy(root: Node, reading: Reading) -> SandboxPolicy:
    """The policy that `root` says, as far as it can be read; every fault is in `reading`. Never raises."""
    return _PolicyReader(reading).policy(root)


class _PolicyReader:
    def __init__(self, reading: Reading) -> None:
        self.r = reading

    def policy(self, root: Node) -> SandboxPolicy:
        got = self.r.fields(root, "", TOP, _TOP_MOVED)
        if isinstance(root, Table) and "version" not in got:
            self.r.problem("missing_field", "", root, "missing field `version`", "write `version: 1` at the top")
        version = (
            self.r.integer(got["version"], "version", 0, U32, "u32", "write `version: 1`") if "version" in got else 1
        )
        got = {key: node for key, node in got.items() if not _null(node)}
        filesystem = self.filesystem(got["filesystem_policy"]) if "filesystem_policy" in got else None
        landlock = self.landlock(got["landlock"]) if "landlock" in got else None
        process = self.process(got["process"]) if "process" in got else None
        rules = self.rules(got["network_policies"]) if "network_policies" in got else {}
        middlewares = self.middlewares(got["network_middlewares"]) if "network_middlewares" in got else {}
        network = self.network(got["network"]) if "network" in got else None
        return SandboxPolicy(version, filesystem, landlock, process, rules, middlewares, network)

    def filesystem(self, node: Node) -> FilesystemPolicy:
        path = "filesystem_policy"
        got = self.r.fields(node, path, ("include_workdir", "read_only", "read_write"))
        workdir = (
            self.r.boolean(got["include_workdir"], f"{path}.include_workdir") if "include_workdir" in got else None
        )
        lists = [self.texts(got, path, name) for name in ("read_only", "read_write")]
        return FilesystemPolicy(workdir, lists[0], lists[1])

    def landlock(self, node: Node) -> LandlockPolicy:
        got = self.r.fields(node, "landlock", ("compatibility",))
        return LandlockPolicy(self.text(got, "landlock", "compatibility"))

    def process(self, node: Node) -> ProcessPolicy:
        got = self.r.fields(node, "process", ("run_as_user", "run_as_group"))
        return ProcessPolicy(self.text(got, "process", "run_as_user"), self.text(got, "process", "run_as_group"))

    def network(self, node: Node) -> NetworkOptions:
        rules = (
            [key.text for key, value in node.pairs if not isinstance(value, Scalar)] if isinstance(node, Table) else []
        )
        got = self.r.fields(node, "network", ("allow_netlink",), dict.fromkeys(rules, _NETWORK_RULES))
        return NetworkOptions(self.netlink(got["allow_netlink"]) if "allow_netlink" in got else Netlink.DENIED)

    def netlink(self, node: Node) -> Netlink:
        """`true`, `false` or the word route; a value that is none of them is a fault and denies."""
        path = "network.allow_netlink"
        value = node.value() if isinstance(node, Scalar) else None
        if isinstance(value, bool):
            return Netlink.ALLOWED if value else Netlink.DENIED
        if value == "route":
            return Netlink.ROUTE
        word = node.text.strip().lower() if isinstance(node, Scalar) else ""
        meant = _NETLINK_WORDS.get(word) or (
            "write `route`" if nearest(word, ("route", "netlink_route")) else "for the list of interfaces write `route`"
        )
        self.r.wrong_type(path, node, "`true`, `false` or `route`", meant)
        return Netlink.DENIED

    def rules(self, node: Node) -> dict[str, NetworkRule]:
        path = "network_policies"
        if isinstance(node, Listing):
            self.r.wrong_type(path, node, "a mapping", _EXPECT_RULE)
            return {}
        found = {key: self.rule(value, child(path, key)) for key, _, value in self.r.entries(node, path)}
        return dict(sorted(found.items()))

    def rule(self, node: Node, path: str) -> NetworkRule:
        got = self.r.fields(node, path, ("name", "endpoints", "binaries"), _RULE_MOVED)
        endpoints = (
            self.r.items(got["endpoints"], child(path, "endpoints"), self.endpoint) if "endpoints" in got else ()
        )
        binaries = self.r.items(got["binaries"], child(path, "binaries"), self.binary) if "binaries" in got else ()
        return NetworkRule(self.text(got, path, "name"), endpoints, binaries)

    def binary(self, node: Node, path: str) -> Binary:
        if isinstance(node, Scalar):
            name = node.text.rsplit("/", 1)[-1]
            written = (
                node.text if node.text.startswith("/") else "/**" if node.text in ("*", "**") else f"/usr/bin/{name}"
            )
            self.r.wrong_type(path, node, "a mapping with `path`", f'write `- path: "{shown(written)}"`')
            return Binary("")
        got = self.r.fields(node, path, ("path", "harness"))
        if "harness" in got:  # upstream reads it for old files and ignores it
            self.r.boolean(got["harness"], child(path, "harness"))
        self.required(got, path, node, "path")
        return Binary(self.text(got, path, "path"))

    def endpoint(self, node: Node, path: str) -> Endpoint:
        if isinstance(node, Scalar):
            self.r.wrong_type(
                path, node, "a mapping with `host` and `port`", "write `- {host: api.example.com, port: 443}`"
            )
            return Endpoint()
        got = self.r.fields(node, path, ENDPOINT, _ENDPOINT_MOVED)
        mcp, rpc_bytes = self.mcp(got, path)
        self.refuse_without_effect(got, path)
        return Endpoint(
            host=self.text(got, path, "host"),
            ports=self.ports(got, path),
            protocol=self.text(got, path, "protocol"),
            tls=self.text(got, path, "tls"),
            enforcement=self.text(got, path, "enforcement"),
            access=self.text(got, path, "access"),
            rules=self.r.items(got["rules"], child(path, "rules"), self.allow) if "rules" in got else (),
            deny_rules=self.r.items(got["deny_rules"], child(path, "deny_rules"), self.deny)
            if "deny_rules" in got
            else (),
            allowed_ips=self.texts(got, path, "allowed_ips"),
            path=self.text(got, path, "path"),
            allow_encoded_slash=self.flag(got, path, "allow_encoded_slash"),
            persisted_queries=self.text(got, path, "persisted_queries"),
            graphql_persisted_queries=self.persisted(got, path),
            graphql_max_body_bytes=self.u32(got, path, "graphql_max_body_bytes"),
            websocket_credential_rewrite=self.flag(got, path, "websocket_credential_rewrite"),
            request_body_credential_rewrite=self.flag(got, path, "request_body_credential_rewrite"),
            credential_signing=self.text(got, path, "credential_signing"),
            signing_service=self.text(got, path, "signing_service"),
            signing_region=self.text(got, path, "signing_region"),
            json_rpc_max_body_bytes=rpc_bytes,
            mcp=mcp,
            credential_binding=self.credential_binding(got, path),
            allow_uninspected_credentials=self.flag(got, path, "allow_uninspected_credentials"),
        )

    def refuse_without_effect(self, got: dict[str, Node], path: str) -> None:
        """What upstream's file loader refuses and a gateway cannot see, because the wire has no form for it."""
        if not self.r.files:
            return
        for key, said in _EMPTY_LISTS.items():
            listed = got.get(key)
            if isinstance(listed, Listing) and not listed.items:
                self.r.problem("list_empty", child(path, key), listed, said)
        limit = "graphql_max_body_bytes"
        limits = [(child(path, limit), limit, got[limit])] if limit in got else []
        for name in ("json_rpc", "mcp"):
            stanza = got.get(name)
            pairs = stanza.pairs if isinstance(stanza, Table) else ()
            found = [value for key, value in pairs if key.text == "max_body_bytes"]
            limits += [(child(path, name), "json_rpc_max_body_bytes", value) for value in found]
        for where, key, node in limits:
            if isinstance(node, Scalar) and type(node.value()) is int and node.value() == 0:
                self.r.problem("limit_zero", where, node, f"{key} must be a positive integer", "remove the key")

    def ports(self, got: dict[str, Node], path: str) -> tuple[int, ...]:
        """`ports` wins over `port` when it is not empty; 0 as `port` is the same as not writing it."""
        single, several = child(path, "port"), child(path, "ports")
        port = 0
        if "port" in got and isinstance(got["port"], Listing):
            self.r.wrong_type(single, got["port"], "u16", "several ports go into `ports`")
        elif "port" in got:
            port = self.port(got["port"], single)
        hint = "write a list: `ports: [443, 8443]`, or use `port` for one"
        ports = self.r.items(got["ports"], several, self.port, hint) if "ports" in got else ()
        if port and ports and ports != (port,):
            node = got["port"]
            self.r.warn(
                "port_ignored",
                single,
                node,
                f"`port: {port}` has no effect because `ports` is written too",
                f"add {port} to `ports`, or remove `port`",
            )
        return ports or ((port,) if port else ())

    def port(self, node: Node, path: str) -> int:
        known = _PORTS.get(node.text.lower()) if isinstance(node, Scalar) else None
        return self.r.integer(node, path, 0, U16, "u16", f"write {known}" if known else "")

    def allow(self, node: Node, path: str) -> L7Allow:
        if not isinstance(node, Table):
            self.r.wrong_type(path, node, "a mapping with `allow`", _ALLOW_FORM)
            return L7Allow()
        got = self.r.fields(node, path, ("allow",), _ALLOW_MOVED)
        if isinstance(node, Table) and not node.pairs:
            self.r.problem(
                "missing_field", path, node, "missing field `allow`", "write `- allow: {method: GET, path: /x}`"
            )
        return L7Allow(*self.match(got["allow"], child(path, "allow"))) if "allow" in got else L7Allow()

    def deny(self, node: Node, path: str) -> L7Deny:
        return L7Deny(*self.match(node, path, _DENY_MOVED))

    def match(
        self, node: Node, path: str, moved: dict[str, str] | None = None
    ) -> tuple[str, str, str, Matchers, str, str, tuple[str, ...], Matchers]:
        if not isinstance(node, Table):
            flat = "write `- {method: DELETE, path: /x}`, one entry for each"
            self.r.wrong_type(path, node, "a mapping", flat if moved else _ALLOW_FORM)
            node = Table(node.line, node.column)
        got = self.r.fields(node, path, L7, (moved or {}) | {"methods": 'one rule per method, or `method: "*"`'})
        query = self.matchers(got["query"], child(path, "query")) if "query" in got else ()
        params = dict(self.params(got["params"], child(path, "params"))) if "params" in got else {}
        if self.r.files and "tool" in got and "name" in params:
            said = "MCP rules must use either tool or params.name, not both"
            self.r.problem("mcp_tool_twice", child(path, "tool"), got["tool"], said, "keep `tool`")
        if "tool" in got and "name" not in params:
            params["name"] = self.matcher(got["tool"], child(path, "tool"))
        text = [self.text(got, path, key) for key in ("method", "path", "command", "operation_type", "operation_name")]
        fields = self.operation_fields(got, path)
        return text[0], text[1], text[2], query, text[3], text[4], fields, tuple(sorted(params.items(), key=_key))

    def matchers(self, node: Node, path: str) -> Matchers:
        found = ((key, self.matcher(value, child(path, key))) for key, _, value in self.r.entries(node, path))
        return tuple(sorted(found, key=_key))

    def params(self, node: Node, path: str, prefix: str = "") -> Matchers:
        """Nested mappings are flattened with dots; a mapping whose only key is `any` is a matcher."""
        result: dict[str, QueryMatcher] = {}
        for key, written, value in self.r.entries(node, path):
            where, name = child(path, key), f"{prefix}{key}"
            nested = isinstance(value, Table) and not self.is_matcher([k.text for k, _ in value.pairs])
            found = self.params(value, where, f"{name}.") if nested else ((name, self.matcher(value, where)),)
            for inner, matcher in found:
                if inner in result:
                    said = f"duplicate key `{shown(inner)}`: nested keys are the same as keys with dots"
                    self.r.problem("duplicate_key", where, written, said, "write it once")
                result[inner] = matcher
        return tuple(result.items())

    def is_matcher(self, keys: list[str]) -> bool:
        """True when a mapping with these keys is a matcher, not a deeper level of `params`."""
        return not set(keys) - {"glob", "any"} if self.r.files else keys == ["any"]

    def matcher(self, node: Node, path: str) -> QueryMatcher:
        if self.r.files:
            return read_file_matcher(self.r, node, path)
        nothing = "unknown matcher keys; only `glob` or `any` are supported"
        if isinstance(node, Scalar) and isinstance(node.value(), str):
            value = self.r.text(node, path)
            if not value and not node.text:
                self.r.problem("empty_matcher", path, node, nothing, 'to match any value write "*"')
            return QueryMatcher(glob=value)
        if isinstance(node, Table) and [key.text for key, _ in node.pairs] == ["any"]:
            self.r.mark(child(path, "any"), node.pairs[0][0])
            values = self.r.texts(node.pairs[0][1], child(path, "any"))
            if isinstance(node.pairs[0][1], Listing) and not all(values):
                self.r.problem(
                    "empty_matcher", path, node, "an entry of `any` is empty", 'to match any value write "*"'
                )
            if isinstance(node.pairs[0][1], Listing) and not values:
                self.r.problem("empty_matcher", path, node, nothing, 'to match any value write "*"')
            return QueryMatcher(any=values)
        hint = 'write the value as a string in quotes, or `{any: ["a", "b*"]}`'
        if isinstance(node, Table) and [key.text for key, _ in node.pairs] == ["glob"]:
            hint = "a file writes the glob itself, without `glob:`"
        self.r.problem(
            "bad_matcher", path, node, "data did not match any variant of untagged enum QueryMatcherDef", hint
        )
        return QueryMatcher()

    def persisted(self, got: dict[str, Node], path: str) -> tuple[tuple[str, GraphqlOperation], ...]:
        key = "graphql_persisted_queries"
        if key not in got:
            return ()
        where = child(path, key)
        found = ((name, self.operation(node, child(where, name))) for name, _, node in self.r.entries(got[key], where))
        return tuple(sorted(found, key=_key))

    def operation(self, node: Node, path: str) -> GraphqlOperation:
        got = self.r.fields(node, path, ("operation_type", "operation_name", "fields"))
        kind, name = self.text(got, path, "operation_type"), self.text(got, path, "operation_name")
        return GraphqlOperation(kind, name, self.operation_fields(got, path))

    def operation_fields(self, got: dict[str, Node], path: str) -> tuple[str, ...]:
        node = got.get("fields")
        if self.r.files and isinstance(node, Listing) and not node.items:
            said = "fields: list must not be empty; omit fields to match all root fields"
            self.r.problem("list_empty", child(path, "fields"), node, said)
        return self.texts(got, path, "fields")

    def mcp(self, got: dict[str, Node], path: str) -> tuple[McpOptions | None, int]:
        """The two booleans, and the body limit: an `mcp` stanza's value, even 0, replaces `json_rpc`'s."""
        limit, before = 0, len(self.r.problems)
        if "json_rpc" in got:
            where = child(path, "json_rpc")
            limit = self.u32(self.r.fields(got["json_rpc"], where, ("max_body_bytes",)), where, "max_body_bytes")
            self.name_stanza("json_rpc", before)
        if "mcp" not in got:
            return None, limit
        where, before = child(path, "mcp"), len(self.r.problems)
        names = ("strict_tool_names", "allow_all_known_mcp_methods")
        stanza = self.r.fields(got["mcp"], where, ("max_body_bytes", *names))
        flags = [self.r.boolean(stanza[name], child(where, name)) if name in stanza else None for name in names]
        options = McpOptions(flags[0], flags[1]) if any(flag is not None for flag in flags) else None
        limit = self.u32(stanza, where, "max_body_bytes")
        self.name_stanza("mcp", before)
        return options, limit

    def name_stanza(self, name: str, before: int) -> None:
        """Upstream's file loader begins what it says of these stanzas with their name; `before` problems were not about it."""
        if self.r.files:
            said = self.r.problems[before:]
            self.r.problems[before:] = [replace(p, message=f"invalid {name} config: {p.message}") for p in said]

    def credential_binding(self, got: dict[str, Node], path: str) -> CredentialBinding | None:
        if "credential_binding" not in got:
            return None
        where, node = child(path, "credential_binding"), got["credential_binding"]
        stanza = self.r.fields(node, where, ("provider",))
        self.required(stanza, where, node, "provider")
        return CredentialBinding(self.text(stanza, where, "provider"))

    def middlewares(self, node: Node) -> dict[str, Middleware]:
        path = "network_middlewares"
        found = {key: self.middleware(value, child(path, key)) for key, _, value in self.r.entries(node, path)}
        return dict(sorted(found.items()))

    def middleware(self, node: Node, path: str) -> Middleware:
        got = self.r.fields(node, path, ("name", "middleware", "config", "on_error", "endpoints", "order"))
        self.required(got, path, node, "middleware")
        where = child(path, "endpoints")
        selector = self.r.fields(got["endpoints"], where, ("include", "exclude")) if "endpoints" in got else {}
        order = self.r.integer(got["order"], child(path, "order"), -I32 - 1, I32, "i32") if "order" in got else 0
        config = self.json(got["config"], child(path, "config")) if "config" in got else {}
        if not isinstance(config, dict):
            self.r.wrong_type(child(path, "config"), got["config"], "a mapping")
            config = {}
        return Middleware(
            middleware=self.text(got, path, "middleware"),
            name=self.text(got, path, "name"),
            config=config,
            on_error=self.text(got, path, "on_error"),
            include=self.texts(selector, where, "include"),
            exclude=self.texts(selector, where, "exclude"),
            order=order,
        )

    def json(self, node: Node, path: str) -> object:
        """Free-form configuration as plain JSON types; the depth is bounded by the document's."""
        if isinstance(node, Scalar):
            return node.value()
        if isinstance(node, Listing):
            return [self.json(item, f"{path}[{number}]") for number, item in enumerate(node.items)]
        return {key: self.json(value, child(path, key)) for key, _, value in self.r.entries(node, path)}

    def required(self, got: dict[str, Node], path: str, node: Node, key: str) -> None:
        if key not in got and isinstance(node, Table):
            self.r.problem("missing_field", path, node, f"missing field `{key}`", f"write `{key}: ...`")

    def text(self, got: dict[str, Node], path: str, key: str) -> str:
        return self.r.text(got[key], child(path, key)) if key in got else ""

    def texts(self, got: dict[str, Node], path: str, key: str) -> tuple[str, ...]:
        return self.r.texts(got[key], child(path, key)) if key in got else ()

    def flag(self, got: dict[str, Node], path: str, key: str) -> bool:
        return self.r.boolean(got[key], child(path, key)) if key in got else False

    def u32(self, got: dict[str, Node], path: str, key: str) -> int:
        return self.r.integer(got[key], child(path, key), 0, U32, "u32") if key in got else 0


def _key(pair: tuple[str, object]) -> str:
    return pair[0]


def _null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value() is None
