"""The workload's environment block: what is inherited, what is taken away, and the one table of proxy and trust variables.

Order as upstream (contract 1.7): inherited, minus what belongs to the supervisor, session variables, proxy, trust; the later
wins. Which variable wants which file is decided by what the client does with it: a variable that REPLACES the client's roots
gets the full bundle, one that ADDS to them gets our certificate alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Never shown to the workload: credentials and identity inputs of the supervisor (contract 1.7, step 2), and the two documents
# that drivers put in the block for us alone.
WITHHELD = frozenset(
    f"OPENSHELL_{name}"
    for name in (
        "OCI_IMAGE_USER",
        "SANDBOX_UID",
        "SANDBOX_GID",
        "SANDBOX_TOKEN",
        "SANDBOX_TOKEN_FILE",
        "K8S_SA_TOKEN_FILE",
        "TLS_CA",
        "TLS_CERT",
        "TLS_KEY",
        "PROVIDER_SPIFFE_WORKLOAD_API_SOCKET",
        "NETWORK_RUNTIME_CAPABILITIES",
        "USER_ENVIRONMENT",
        "MAIN_PROCESS_SPEC",
    )
)

# The proxy's URL goes into these. `all_proxy` in lower case is left out as upstream does.
PROXY_URL_VARIABLES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "grpc_proxy")
NO_PROXY_VARIABLES = ("NO_PROXY", "no_proxy")
NO_PROXY = "127.0.0.1,localhost,::1"

# Variables that replace the client's roots: full bundle. Clients: OpenSSL users and Go; requests; curl; git; pip; AWS SDKs and
# CLI; cargo; npm; Nix; httplib2; gRPC core; Google Cloud SDK; yarn (berry).
BUNDLE_VARIABLES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "PIP_CERT",
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
    "NPM_CONFIG_CAFILE",
    "NIX_SSL_CERT_FILE",
    "HTTPLIB2_CA_CERTS",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",
    "YARN_HTTPS_CA_FILE_PATH",
)
# Variables that add to the client's roots: our certificate alone. Clients: Node.js; Deno.
ADDITION_VARIABLES = ("NODE_EXTRA_CA_CERTS", "DENO_CERT")
# Switches that make a client look at the above: Node's fetch honours proxy variables only with the first; uv reads the
# system's roots (and with them SSL_CERT_FILE) only with one of the others, by version.
SWITCHES = {"NODE_USE_ENV_PROXY": "1"}
TRUST_SWITCHES = {"UV_NATIVE_TLS": "true", "UV_SYSTEM_CERTS": "true"}


@dataclass(frozen=True, slots=True)
class Session:
    """Who the workload is, for HOME, USER and TERM."""

    user: str
    home: str
    tty: bool


@dataclass(frozen=True, slots=True)
class Trust:
    """The two PEM files: our certificate alone, and the system's roots with ours."""

    certificate: Path
    bundle: Path


def workload_environment(
    inherited: Mapping[str, str],
    *,
    session: Session,
    user_variables: Mapping[str, str],
    proxy_url: str | None,
    trust: Trust | None,
) -> dict[str, str]:
    """The complete block for execve(2). `user_variables` are those the user set through the driver; they keep their value
    against the session's defaults, but never against the proxy's and the trust's."""
    block = {name: value for name, value in inherited.items() if name not in WITHHELD}
    block["OPENSHELL_SANDBOX"] = "1"
    defaults = {
        "HOME": session.home,
        "USER": session.user,
        "SHELL": "/bin/bash",
        "TERM": inherited.get("TERM", "xterm-256color") if session.tty else "dumb",
    }
    block.update((name, value) for name, value in defaults.items() if name not in user_variables)
    if proxy_url is not None:
        block.update(proxy_variables(proxy_url))
    if trust is not None:
        block.update(trust_variables(trust))
    return block


def proxy_variables(url: str) -> dict[str, str]:
    """The variables by which clients find the proxy."""
    return dict.fromkeys(PROXY_URL_VARIABLES, url) | dict.fromkeys(NO_PROXY_VARIABLES, NO_PROXY) | SWITCHES


def trust_variables(trust: Trust) -> dict[str, str]:
    """The variables by which clients come to trust the certificates that the proxy makes."""
    replacing = dict.fromkeys(BUNDLE_VARIABLES, str(trust.bundle))
    adding = dict.fromkeys(ADDITION_VARIABLES, str(trust.certificate))
    return replacing | adding | TRUST_SWITCHES
