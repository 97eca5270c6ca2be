# May this leave? Upstream's package and rule names; the logic is policy.md 2.4 to 2.7.
#
# Written for both evaluators, rego-cpp in the process and an OPA server: `some i, x in` inside a comprehension, `every`, `with`
# and net.cidr_contains are avoided, because rego-cpp does not have them.
#
# The two *_authorization documents carry no text of the workload's, so that a fault in an evaluator's escaping can never
# forge a decision; deny_reason and request_deny_reason are for people and are asked for on their own.
#
# input.network           {"host": lower case, "port": number}
# input.exec              {"path", "ancestors", "cmdline_paths"}
# input.request           {"method" in upper case, "path", "query_params": {name: [values]}}; absent for the question about a connection
#                         Of a body also "refused_as" and "refusal" where it may not be judged, "control" for a message that
#                         needs no judging, "operations" where there are some of GraphQL, or "rpc": {"verb", "calls": [{"allow",
#                         "deny", "tool_call"}], "responses", "receive_stream"}; "allow" and "deny" are the rules whose patterns
#                         match, one of each endpoint: [[policy, endpoint, rule]].
# input.runtime           {"require_binary_identity": bool}
# input.policies_exist    false when the policy has no rule at all
# input.network_policies  the rules that the index could not rule out: {key: {"endpoints": [..], "binaries": [..]}} in the shape of
#                         upstream's data document. An endpoint also carries "index" (its place in the rule as written),
#                         "wildcard", "hostless", "inspected", "built" (whether the request was read as its protocol),
#                         "specificity"; with calls asked about "calls", "profile", "tool_rules", "invalid_call" (a pattern
#                         that is no glob); with operations "invalid_operation" and "operations", those of the request as the
#                         endpoint knows them: [{"allow": rule, "deny": rule} or {"unregistered": 1}].
# input.globs             which globs match, by kind: {"hosts", "binaries", "paths", "selectors": {pattern: true},
#                         "queries": {pattern: {value: true}}, "invalid": {pattern: true}}. The dialect is upstream's, which no
#                         evaluator's glob.match speaks; a pattern that is not asked here is not there.

package openshell.sandbox

import rego.v1

# ---- the connection ------------------------------------------------------------------------------------------------------

default allow_network := false

allow_network if {
	count(host_errors) == 0
	count(live) > 0
}

# The endpoints that match the connection, of the rules that list the caller.
live := [{"policy": key, "endpoint": endpoint} |
	some key
	rule := input.network_policies[key]
	binary_allowed(rule)
	some endpoint in rule.endpoints
	endpoint_matches(endpoint)
]

# Rules that have the endpoint, whoever calls.
endpoint_policies contains key if {
	some key, rule in input.network_policies
	some endpoint in rule.endpoints
	endpoint_matches(endpoint)
}

endpoint_matches(endpoint) if {
	input.network.port in endpoint.ports
	host_matches(endpoint)
}

host_matches(endpoint) if {
	endpoint.host == input.network.host
	not endpoint.wildcard
}

host_matches(endpoint) if {
	endpoint.wildcard
	input.globs.hosts[endpoint.host]
}

host_matches(endpoint) if endpoint.hostless

# A host pattern that is no glob fails every question about its port, as upstream's evaluation does.
host_errors contains endpoint.host if {
	input.globs.invalid
	some _, rule in input.network_policies
	some endpoint in rule.endpoints
	endpoint.wildcard
	input.globs.invalid[endpoint.host]
	input.network.port in endpoint.ports
}

binary_allowed(_) if input.runtime.require_binary_identity == false

binary_allowed(rule) if {
	input.runtime.require_binary_identity
	some binary in rule.binaries
	binary_matches(binary.path)
}

binary_matches(path) if {
	not contains(path, "*")
	path in callers
}

binary_matches(path) if {
	contains(path, "*")
	input.globs.binaries[path]
}

callers contains input.exec.path

callers contains path if some path in input.exec.ancestors

matched contains [item.policy, item.endpoint.index] if some item in live

matched_network_policy := min({item.policy | some item in live})

# Somebody wrote this very host down, and not the policy advisor: private addresses are then meant.
default exact_declared_endpoint_host := false

exact_declared_endpoint_host if {
	some item in live
	item.endpoint.host == input.network.host
	not item.endpoint.wildcard
	not item.endpoint.advisor_proposed
	declared_binary_allowed(input.network_policies[item.policy])
}

declared_binary_allowed(_) if input.runtime.require_binary_identity == false

declared_binary_allowed(rule) if {
	input.runtime.require_binary_identity
	some binary in rule.binaries
	not binary.advisor_proposed
	binary_matches(binary.path)
}

network_outcome := "engine_error" if {
	count(host_errors) > 0
} else := "allowed" if {
	allow_network
} else := "binary_not_allowed" if {
	count(endpoint_policies) > 0
} else := "endpoint_not_allowed" if {
	input.policies_exist
} else := "no_policies"

deny_reason := sprintf("policy evaluation error: invalid glob '%s'", [min(host_errors)]) if {
	network_outcome == "engine_error"
} else := concat("; ", [missing_binary(key) | some key in sort(endpoint_policies)]) if {
	network_outcome == "binary_not_allowed"
} else := sprintf("endpoint %s:%d is not allowed by any policy", [input.network.host, input.network.port]) if {
	network_outcome == "endpoint_not_allowed"
} else := "network connections not allowed by policy" if {
	network_outcome == "no_policies"
}

missing_binary(key) := concat("", [
	"binary '",
	input.exec.path,
	"' not allowed in policy '",
	key,
	"' (ancestors: [",
	joined(" -> ", input.exec.ancestors),
	"], cmdline: [",
	joined(", ", input.exec.cmdline_paths),
	"]). ",
	symlink_hint,
])

# rego-cpp's concat of nothing is not the empty string; and its sprintf quotes what concat made, hence concat throughout.
joined(_, list) := "" if count(list) == 0

joined(separator, list) := concat(separator, list) if count(list) > 0

symlink_hint := concat(" ", [
	"SYMLINK HINT: the binary path is the kernel-resolved target of /proc/<pid>/exe, not the symlink.",
	"If the policy names a symlink, run `readlink -f` on it inside the sandbox and list the resolved path.",
])

default network_action := "deny"

network_action := "allow" if allow_network

egress_authorization := {
	"action": network_action,
	"reason_id": network_outcome,
	"errors": host_errors,
	"matched_policy": object.get({"policy": matched_network_policy | allow_network}, "policy", ""),
	"matched_endpoints": matched,
	"endpoint_policies": endpoint_policies,
	"exact_declared_endpoint_host": exact_declared_endpoint_host,
}

# ---- the request ---------------------------------------------------------------------------------------------------------

# Endpoints that want requests to be looked at. Where there is none, an allowed connection carries any request.
inspected := [item | some item in live; item.endpoint.inspected]

# Whose parser and enforcement count: the most path-specific endpoint that is selected, the last of equals.
candidates := [[item.endpoint.specificity, item.policy, item.endpoint.index] |
	some item in inspected
	input.globs.selectors[item.endpoint.path]
]

selected := max(candidates)

selected_endpoint := item.endpoint if {
	some item in inspected
	item.policy == selected[1]
	item.endpoint.index == selected[2]
}

# The endpoints whose rules take part: those that match the connection and whose path the request satisfies.
taking_part := [item | some item in live; endpoint_path_matches(item.endpoint.path)]

endpoint_path_matches("")

endpoint_path_matches(pattern) if path_matches(pattern)

path_matches("**")

path_matches(pattern) if input.globs.paths[pattern]

method_matches("*")

method_matches(method) if method == input.request.method

method_matches("GET") if input.request.method == "HEAD"

# A rule of an endpoint as whose protocol the request was not read allows nothing; its deny rules with method and path still deny.
head_allowed_by contains [item.policy, item.endpoint.index, rule.index] if {
	some item in taking_part
	item.endpoint.built
	some rule in item.endpoint.rules
	method_matches(rule.method)
	path_matches(rule.path)
	query_allows(rule)
}

denied_by contains [item.policy, item.endpoint.index, rule.index] if {
	some item in taking_part
	some rule in item.endpoint.deny_rules
	method_matches(rule.method)
	path_matches(rule.path)
	query_denies(rule)
}

# Allow: every configured key has at least one value and each of its values matches.
query_allows(match) if not match.query

query_allows(match) if {
	match.query
	not query_fails(match)
}

query_fails(match) if {
	some key, globs in match.query
	query_key_fails(globs, key)
}

query_key_fails(_, key) if not input.request.query_params[key]

query_key_fails(globs, key) if {
	some value in input.request.query_params[key]
	not value_matches(globs, value)
}

# Deny: every configured key has at least one value that matches.
query_denies(match) if not match.query

query_denies(match) if {
	match.query
	not query_missed(match)
}

query_missed(match) if {
	some key, globs in match.query
	not query_key_hit(globs, key)
}

query_key_hit(globs, key) if {
	some value in input.request.query_params[key]
	value_matches(globs, value)
}

value_matches(globs, value) if {
	some glob in globs
	input.globs.queries[glob][value]
}

# A glob that cannot be evaluated fails the evaluation that reaches it: the request is denied, also under audit.
request_errors contains item.endpoint.path if {
	input.globs.invalid
	some item in live
	input.globs.invalid[item.endpoint.path]
}

request_errors contains rule.path if {
	input.globs.invalid
	some item in taking_part
	some rule in array.concat(item.endpoint.rules, item.endpoint.deny_rules)
	input.globs.invalid[rule.path]
	method_matches(rule.method)
}

request_errors contains glob if {
	input.globs.invalid
	some item in taking_part
	some rule in array.concat(item.endpoint.rules, item.endpoint.deny_rules)
	some _, globs in rule.query
	some glob in globs
	input.globs.invalid[glob]
	method_matches(rule.method)
	path_matches(rule.path)
}

# ---- calls: JSON-RPC and MCP ---------------------------------------------------------------------------------------------

# Where a rule can fire: the endpoints that take part, and of these the ones as whose protocol the request was read.
present contains [item.policy, item.endpoint.index] if some item in taking_part

able contains [item.policy, item.endpoint.index] if {
	some item in taking_part
	item.endpoint.built
}

call_endpoints := [item | some item in taking_part; item.endpoint.built; item.endpoint.calls]

call_allowed_by contains rule if {
	input.request.rpc.verb == "POST"
	some call in input.request.rpc.calls
	some rule in call.allow
	[rule[0], rule[1]] in able
}

# By no single rule (-1): the profile that allows every method, an answer to the server, the stream of its messages.
call_allowed_by contains [item.policy, item.endpoint.index, -1] if {
	some item in call_endpoints
	some call in input.request.rpc.calls
	profile_allows(item.endpoint, call)
}

call_allowed_by contains [item.policy, item.endpoint.index, -1] if {
	some item in call_endpoints
	answer_allowed(item.endpoint.protocol)
}

# With rules on tools the profile no longer covers calls of tools.
profile_allows(endpoint, call) if {
	endpoint.profile
	input.request.rpc.verb == "POST"
	not narrowed(endpoint, call)
}

narrowed(endpoint, call) if {
	endpoint.tool_rules
	call.tool_call
}

answer_allowed("mcp") if {
	input.request.rpc.responses
	input.request.rpc.verb == "POST"
}

answer_allowed("mcp") if {
	input.request.rpc.receive_stream
	input.request.rpc.verb == "GET"
}

# Of a batch every call must be allowed, each perhaps by another endpoint.
calls_allowed if {
	count(call_allowed_by) > 0
	not call_refused
	not answer_refused
}

call_refused if {
	some call in input.request.rpc.calls
	not call_allowed(call)
}

call_allowed(call) if {
	input.request.rpc.verb == "POST"
	some rule in call.allow
	[rule[0], rule[1]] in able
}

call_allowed(call) if {
	some item in call_endpoints
	profile_allows(item.endpoint, call)
}

answer_refused if {
	input.request.rpc.responses
	count([item | some item in call_endpoints; answer_allowed(item.endpoint.protocol)]) == 0
}

denied_by contains rule if {
	input.request.rpc.verb == "POST"
	some call in input.request.rpc.calls
	some rule in call.deny
	[rule[0], rule[1]] in present
}

# A client has nothing to answer in plain JSON-RPC.
response_refused if {
	input.request.rpc.responses
	input.request.rpc.verb == "POST"
	some item in taking_part
	item.endpoint.calls
	item.endpoint.protocol == "json-rpc"
}

request_errors contains item.endpoint.invalid_call if {
	input.request.rpc
	some item in taking_part
	item.endpoint.invalid_call
}

# ---- operations: GraphQL -------------------------------------------------------------------------------------------------

operation_allowed_by contains [item.policy, item.endpoint.index, operation.allow] if {
	input.request.operations
	some item in taking_part
	item.endpoint.built
	graphql_ok(item.endpoint)
	some operation in item.endpoint.operations
}

# An endpoint says yes when every operation is allowed by a rule of its own.
graphql_ok(endpoint) if {
	count(endpoint.operations) > 0
	not operation_failed(endpoint)
}

operation_failed(endpoint) if {
	some operation in endpoint.operations
	not operation_allowed(operation)
}

operation_allowed(operation) if operation.allow >= 0

denied_by contains [item.policy, item.endpoint.index, operation.deny] if {
	input.request.operations
	some item in taking_part
	some operation in item.endpoint.operations
	operation.deny >= 0
}

# Of several endpoints that speak of operations each must say yes: a broad REST rule next to one does not let operations through.
default vetoed := false

vetoed if {
	input.request.operations
	some item in taking_part
	item.endpoint.operations
	item.endpoint.protocol in ["graphql", "websocket"]
	not graphql_ok(item.endpoint)
}

not_registered if {
	input.request.operations
	some item in taking_part
	item.endpoint.protocol in ["graphql", "websocket"]
	some operation in item.endpoint.operations
	operation.unregistered
}

request_errors contains item.endpoint.invalid_operation if {
	input.request.operations
	some item in taking_part
	item.endpoint.invalid_operation
}

# ---- the outcome ---------------------------------------------------------------------------------------------------------

default permitted := false

permitted if count(head_allowed_by) > 0

permitted if calls_allowed

permitted if count(operation_allowed_by) > 0

# Of a protocol that nobody parses, as upstream: what the rules cannot see they do not judge.
permitted if selected_endpoint.protocol == "sql"

# A message that only keeps a GraphQL connection going.
permitted if {
	selected_endpoint.protocol == "websocket"
	input.request.control
}

request_outcome := network_outcome if {
	not allow_network
} else := "allowed" if {
	count(inspected) == 0
} else := "engine_error" if {
	count(request_errors) > 0
} else := "no_endpoint_path" if {
	count(candidates) == 0
} else := "protocol_not_built" if {
	not selected_endpoint.built
} else := "invalid_request_target" if {
	encoded_slash_refused
} else := input.request.refused_as if {
	input.request.refused_as
} else := "json_rpc_response" if {
	response_refused
} else := "graphql_not_registered" if {
	not_registered
} else := "deny_rule" if {
	count(denied_by) > 0
} else := "allowed" if {
	permitted
	not vetoed
} else := "rule_not_matched"

encoded_slash_refused if {
	contains(input.request.path, "%2F")
	not selected_endpoint.allow_encoded_slash
}

default allow_request := false

allow_request if request_outcome == "allowed"

request_line := concat(" ", [input.request.method, input.request.path])

operations_asked if input.request.operations

request_deny_reason := deny_reason if {
	not allow_network
} else := sprintf("L7 evaluation error: invalid glob '%s'", [min(request_errors)]) if {
	request_outcome == "engine_error"
} else := sprintf("protocol %s is not built yet, so no request to this endpoint is let through", [selected_endpoint.protocol]) if {
	request_outcome == "protocol_not_built"
} else := "request-target contains an encoded '/' (%2F) which is not allowed on this endpoint" if {
	request_outcome == "invalid_request_target"
} else := input.request.refusal if {
	request_outcome == input.request.refused_as
} else := "GraphQL persisted query is not registered" if {
	request_outcome == "graphql_not_registered"
} else := "GraphQL operation blocked by endpoint policy" if {
	operations_asked
	request_outcome == "deny_rule"
} else := "GraphQL operation blocked by endpoint policy" if {
	operations_asked
	request_outcome == "rule_not_matched"
	vetoed
} else := "GraphQL operation not permitted by policy" if {
	operations_asked
	request_outcome == "rule_not_matched"
} else := "JSON-RPC response frames are not permitted from client to server" if {
	request_outcome == "json_rpc_response"
} else := concat(" ", [request_line, "blocked by deny rule"]) if {
	request_outcome == "deny_rule"
} else := "no L7 endpoint path matched request" if {
	request_outcome == "no_endpoint_path"
	count(inspected) > 1
} else := concat(" ", [request_line, "not permitted by policy"]) if {
	request_outcome != "allowed"
}

request_authorization := {
	"allow": allow_request,
	"reason_id": request_outcome,
	"errors": request_errors,
	"allowed_by": (head_allowed_by | call_allowed_by) | operation_allowed_by,
	"denied_by": denied_by,
	"vetoed": vetoed,
	"selected": object.get({"triple": selected | count(candidates) > 0}, "triple", []),
}
