"""The workload's environment block: what is inherited, what is taken away, and the one table of proxy and trust variables.

Order as upstream (contract 1.7): inherited, minus what belongs to the supervisor, session variables, proxy, trust; the later
wins. Which variable wants which file is decided by what the client does with it: a variable that REPLACES the client's roots
gets the full bundle, one that ADDS to them gets our certificate alone. tests/clients drives the real clients with this table.
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

# The proxy's URL goes into these. `all_proxy` in lower case is left out as upstream does. curl, Go and most clients read the
# lower or the upper case; gRPC core reads grpc_proxy first. Yarn (berry) reads its own names alone.
PROXY_URL_VARIABLES = (
    "ALL_PROXY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "http_proxy",
    "https_proxy",
    "grpc_proxy",
    "YARN_HTTP_PROXY",
    "YARN_HTTPS_PROXY",
)
NO_PROXY_VARIABLES = ("NO_PROXY", "no_proxy")
NO_PROXY = "127.0.0.1,localhost,::1"
# Names that outrank the above in some client: inherited, they would lead it to another proxy, which cannot be reached, past
# ours, into nothing; and their values may hold the credentials of the supervisor's own proxy. curl and Python prefer
# all_proxy, ws_proxy and the like to ALL_PROXY; npm, pip, cargo and global-agent prefer their own names; gRPC core has a
# no_proxy of its own. Compared without regard to case: Python and npm read them in any.
OUTRANKING_PROXY_VARIABLES = frozenset(
    (
        "all_proxy",
        "ftp_proxy",
        "socks_proxy",
        "ws_proxy",
        "wss_proxy",
        "no_grpc_proxy",
        "npm_config_proxy",
        "npm_config_http_proxy",
        "npm_config_https_proxy",
        "npm_config_noproxy",
        "pip_proxy",
        "cargo_http_proxy",
        "global_agent_http_proxy",
        "global_agent_https_proxy",
        "global_agent_no_proxy",
    )
)

# Variables that replace the client's roots: full bundle, so that a tunnel which nobody inspects verifies too.
BUNDLE_VARIABLES = (
    "SSL_CERT_FILE",  # OpenSSL and what rests on it (Python, Ruby, httpx, aiohttp, s_client), Go, rustls-native-certs, uv
    "REQUESTS_CA_BUNDLE",  # requests, and with it conda and the Azure CLI
    "CURL_CA_BUNDLE",  # curl
    "GIT_SSL_CAINFO",  # git, also where it rests on GnuTLS, which reads no SSL_CERT_FILE
    "PIP_CERT",  # pip, ahead of its own bundle
    "AWS_CA_BUNDLE",  # AWS CLI and SDKs
    "CARGO_HTTP_CAINFO",  # cargo
    "NPM_CONFIG_CAFILE",  # npm and pnpm, which do not add NODE_EXTRA_CA_CERTS once a cafile is configured
    "NIX_SSL_CERT_FILE",  # Nix, whose OpenSSL looks nowhere else
    "HTTPLIB2_CA_CERTS",  # httplib2, and with it Google's older Python clients
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",  # gRPC core (C++, Python, Ruby, PHP, C#)
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",  # gcloud
    "YARN_HTTPS_CA_FILE_PATH",  # Yarn (berry)
    "PERL_LWP_SSL_CA_FILE",  # Perl's LWP, which otherwise prefers the roots of Mozilla::CA
)
# Variables that add to the client's roots: our certificate alone.
ADDITION_VARIABLES = (
    "NODE_EXTRA_CA_CERTS",  # Node.js, Bun
    "DENO_CERT",  # Deno
)
# Outrank the above in npm, which reads its settings in any case: one certificate inline, and the same file spelled otherwise.
OUTRANKING_TRUST_VARIABLES = frozenset(("npm_config_ca", "npm_config_cafile"))
# Switches that make a client look at the above. Node's fetch and https ask the environment for a proxy from 22.21 and 24 on,
# and only with this one.
SWITCHES = {"NODE_USE_ENV_PROXY": "1"}
# The same for roots: uv reads the system's, and with them SSL_CERT_FILE, with one of the first two, by version; Node.js from
# 22.19 and 24.6 on with the third, so that it verifies what nobody inspects as the other clients do, by the whole bundle.
TRUST_SWITCHES = {"UV_NATIVE_TLS": "true", "UV_SYSTEM_CERTS": "true", "NODE_USE_SYSTEM_CA": "1"}


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
    """The complete block for execve(2). `user_variables` are those the user set through the driver, which puts them into our own
    block as well: what is inherited under these names counts against the session's defaults, but never against the proxy's
    and the trust's."""
    block = {name: value for name, value in inherited.items() if name not in WITHHELD}
    block["OPENSHELL_SANDBOX"] = "1"
    defaults = {
        "HOME": session.home,
        "USER": session.user,
        "LOGNAME": session.user,  # POSIX's name for it; Python's getpass and many tools read it before USER
        "SHELL": "/bin/bash",
        "TERM": inherited.get("TERM", "xterm-256color") if session.tty else "dumb",
    }
    block.update((name, value) for name, value in defaults.items() if name not in user_variables)
    if proxy_url is not None:
        block = _replaced(block, proxy_variables(proxy_url), OUTRANKING_PROXY_VARIABLES)
    if trust is not None:
        block = _replaced(block, trust_variables(trust), OUTRANKING_TRUST_VARIABLES)
    return block


def _replaced(block: Mapping[str, str], ours: Mapping[str, str], outranking: frozenset[str]) -> dict[str, str]:
    """`block` with `ours` in place of everything of those names, in any case, and of what would outrank them."""
    gone = outranking | {name.lower() for name in ours}
    return {name: value for name, value in block.items() if name.lower() not in gone} | dict(ours)


def proxy_variables(url: str) -> dict[str, str]:
    """The variables by which clients find the proxy."""
    return dict.fromkeys(PROXY_URL_VARIABLES, url) | dict.fromkeys(NO_PROXY_VARIABLES, NO_PROXY) | SWITCHES


def trust_variables(trust: Trust) -> dict[str, str]:
    """The variables by which clients come to trust the certificates that the proxy makes."""
    replacing = dict.fromkeys(BUNDLE_VARIABLES, str(trust.bundle))
    adding = dict.fromkeys(ADDITION_VARIABLES, str(trust.certificate))
    return replacing | adding | TRUST_SWITCHES
