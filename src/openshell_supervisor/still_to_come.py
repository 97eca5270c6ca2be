"""What the interface of the supervisor that this one replaces has, and this one has not yet: refused by name, with the reason.

Entries leave this file when their part is built. Nothing is ignored in silence; `IGNORED_FLAGS` has no effect upstream either.
"""

from __future__ import annotations

STILL_TO_COME_FLAGS = {
    "--inference-routes": "inference routing is not built yet",
    "--upstream-proxy": "the corporate upstream proxy is not built yet",
    "--upstream-no-proxy": "the corporate upstream proxy is not built yet",
    "--upstream-proxy-auth-file": "the corporate upstream proxy is not built yet",
    "--ssh-socket-path": "the SSH server is not built yet",
}
STILL_TO_COME_SWITCHES = {
    "--upstream-proxy-auth-allow-insecure": "the corporate upstream proxy is not built yet",
    "--upstream-proxy-connect-by-hostname": "the corporate upstream proxy is not built yet",
}
STILL_TO_COME_VARIABLES = {
    "OPENSHELL_INFERENCE_ROUTES": "inference routing is not built yet",
    "OPENSHELL_SSH_SOCKET_PATH": "the SSH server is not built yet",
    "OPENSHELL_MODE": "the proxy and nested roles are not built yet",
    "OPENSHELL_PROXY_MODE": "the sidecar topology is not built yet",
    "OPENSHELL_SUPERVISOR_TOPOLOGY": "the sidecar topology is not built yet",
    "OPENSHELL_NETWORK_ENFORCEMENT_MODE": "the sidecar topology is not built yet",
    "OPENSHELL_SIDECAR_CONTROL_SOCKET": "the sidecar topology is not built yet",
    "OPENSHELL_PROVIDER_SPIFFE_WORKLOAD_API_SOCKET": "the SPIFFE identity socket is not built yet",
}
# Accepted and without effect, as upstream: the first two always, the others outside `--mode=network-init` (contract 1.2).
IGNORED_FLAGS = (
    "--health-check",
    "--health-port",
    "--proxy-uid",
    "--proxy-gid",
    "--sidecar-state-dir",
    "--sidecar-tls-dir",
)
RESERVED_WORDS = {
    "copy-self": "copying the supervisor into another image is not built yet",
    "debug-rpc": "the gateway client is not built yet",
    "validate-workspace": "the workspace check is not built yet",
    "exec": "exec is not built yet",
}
