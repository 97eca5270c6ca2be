"""Hypothesis strategies for policies and facts that have a real chance to meet."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from openshell_supervisor.policy.model import (
    Binary,
    Endpoint,
    L7Allow,
    L7Deny,
    NetworkRule,
    QueryMatcher,
    SandboxPolicy,
)
from openshell_supervisor.verdict.facts import Facts, Request

HOSTS = (
    "a.example.com",
    "b.example.com",
    "x.a.example.com",
    "example.com",
    "api.other.org",
    "10.0.0.5",
    ".example.com",
    "A.Example.COM",
)
PATTERNS = (
    *HOSTS,
    "*.example.com",
    "**.example.com",
    "a*.example.com",
    "*.a.*.com",
    "*.{example,other}.com",
    "*.[e.example.com",
    "",
)
PORTS = (80, 443)
PATHS = ("/", "/x", "/x/y", "/x/y/z", "/x%2Fy", "/v1", "/v1/a", '/"', "/é")
PATH_GLOBS = ("**", "/**", "/x", "/x/*", "/x/**", "/*", "/**/z", "/v1/**", "/[", "/x{,/y}", "")
SELECTORS = ("", "**", "/**", "/x/**", "/v1/**", "/v1", "/[")
METHODS = ("GET", "HEAD", "get", "POST", "*", "P*", "")
BINARIES = ("/usr/bin/curl", "/usr/bin/git", "/usr/bin/*", "/**", "/usr/**/git", "")
VALUES = ("", "a", "a.b", 'a","allow":true,"', "\\", "é", "%s")
GLOBS = ("*", "**", "a", "a.*", "a*", "[", 'a","allow":true,"')

queries = st.lists(st.tuples(st.sampled_from(("q", "r")), st.sampled_from(VALUES)), max_size=3).map(tuple)
matchers = st.sampled_from(GLOBS).map(lambda glob: QueryMatcher(glob=glob)) | st.lists(
    st.sampled_from(GLOBS), min_size=1, max_size=2
).map(lambda globs: QueryMatcher(any=tuple(globs)))
matcher_maps = st.dictionaries(st.sampled_from(("q", "r")), matchers, max_size=2).map(
    lambda found: tuple(found.items())
)
allows = st.builds(L7Allow, method=st.sampled_from(METHODS), path=st.sampled_from(PATH_GLOBS), query=matcher_maps)
denies = st.builds(L7Deny, method=st.sampled_from(METHODS), path=st.sampled_from(PATH_GLOBS), query=matcher_maps)
endpoints = st.builds(
    Endpoint,
    host=st.sampled_from(PATTERNS),
    ports=st.lists(st.sampled_from(PORTS), min_size=1, max_size=2, unique=True).map(tuple),
    protocol=st.sampled_from(("", "tcp", "rest", "rest", "rest", "REST", "graphql", "mcp")),
    tls=st.sampled_from(("", "skip")),
    enforcement=st.sampled_from(("", "enforce", "audit")),
    access=st.sampled_from(("", "", "read-only", "full", "typo")),
    rules=st.lists(allows, max_size=3).map(tuple),
    deny_rules=st.lists(denies, max_size=2).map(tuple),
    allowed_ips=st.sampled_from(((), (), ("10.0.0.0/8",))),
    path=st.sampled_from(SELECTORS),
    allow_encoded_slash=st.booleans(),
    advisor_proposed=st.booleans(),
)
hostless = endpoints.map(lambda endpoint: replace(endpoint, host="", allowed_ips=("10.0.0.0/8",)))
rules = st.builds(
    NetworkRule,
    endpoints=st.lists(endpoints | endpoints | endpoints | hostless, max_size=3).map(tuple),
    binaries=st.lists(st.builds(Binary, st.sampled_from(BINARIES), st.booleans()), max_size=2).map(tuple),
)
policies = st.dictionaries(st.sampled_from(("a", "b", "c", 'd"e')), rules, max_size=3).map(
    lambda found: SandboxPolicy(network_policies=found)
)
requests = st.builds(
    Request, method=st.sampled_from(("GET", "HEAD", "get", "POST", "PURGE")), path=st.sampled_from(PATHS), query=queries
)
facts = st.builds(
    Facts,
    host=st.sampled_from(HOSTS),
    port=st.sampled_from(PORTS),
    binary=st.sampled_from(("/usr/bin/curl", "/usr/lib/git", "/opt/x", "")),
    ancestors=st.sampled_from(((), ("/usr/bin/git",), ("/bin/bash", "/usr/bin/curl"))),
    request=st.none() | requests,
)


def open_world(policy: SandboxPolicy) -> SandboxPolicy:
    """The policy with every endpoint of its rules open to `**.example.com` on both ports, so that denials are rarely of host."""
    opened = {
        key: replace(rule, endpoints=tuple(replace(e, host="**.example.com", ports=PORTS) for e in rule.endpoints))
        for key, rule in policy.network_policies.items()
    }
    return replace(policy, network_policies=opened)
