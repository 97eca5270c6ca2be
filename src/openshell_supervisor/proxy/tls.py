"""TLS on both legs, with the standard library's OpenSSL: the sandbox's leaf to the client, a verified session to the upstream.

The name is the CONNECT host on both legs, whatever the client's SNI says: the leaf is made for it and the upstream must prove
it. mitmproxy's own TLS layers are not used: they follow the client's SNI, wrap each record in four generators, and cost
more than the rest of a request. Private keys reach OpenSSL through a memfd, never through a file system.
"""

from __future__ import annotations

import os
import ssl
from collections import OrderedDict
from pathlib import Path

from openshell_supervisor.proxy.authority import CertificateAuthority, trusted_roots

# A context with a leaf is about 30 KiB of OpenSSL memory; 256 hosts is upstream's own bound for leaves.
MAX_CONTEXTS = 256
HANDSHAKE_TIMEOUT = 10.0
# How long asyncio waits for the peer's close_notify before it drops the connection.
SHUTDOWN_TIMEOUT = 2.0

# The application protocols that can be inspected, in our order of preference.
INSPECTABLE = ("h2", "http/1.1")


class TlsSuite:
    """Makes and remembers the contexts. `upstream_ca` is a PEM file of roots trusted beside the system's."""

    def __init__(self, authority: CertificateAuthority, upstream_ca: Path | None) -> None:
        self._authority = authority
        self._upstream_ca = upstream_ca
        self._server: OrderedDict[tuple[str, str], ssl.SSLContext] = OrderedDict()
        self._client: dict[tuple[str, ...], ssl.SSLContext] = {}

    def prepare(self) -> None:
        """Make what the first handshakes would otherwise wait for."""
        for offers in (INSPECTABLE, ("http/1.1",)):
            self.toward_upstream(offers)
        self._authority.load()

    def toward_client(self, host: str, protocol: str) -> ssl.SSLContext:
        """A server context with the leaf for `host`, which selects `protocol` ("" for no ALPN answer)."""
        key = (host, protocol)
        context = self._server.get(key)
        if context is not None:
            self._server.move_to_end(key)
            return context
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        if protocol:
            context.set_alpn_protocols([protocol])
        _load_chain(context, self._authority.leaf_pem(host))
        self._server[key] = context
        if len(self._server) > MAX_CONTEXTS:
            self._server.popitem(last=False)
        return context

    def toward_upstream(self, offers: tuple[str, ...]) -> ssl.SSLContext:
        """A client context that verifies chain and name and offers what of `offers` can be inspected."""
        protocols = tuple(protocol for protocol in INSPECTABLE if protocol in offers)
        context = self._client.get(protocols)
        if context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the host name and requires a chain
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
            context.hostname_checks_common_name = False
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_TRUSTED_FIRST
            for roots in trusted_roots(self._upstream_ca):
                context.load_verify_locations(cadata=roots.decode("ascii", "replace"))
            if protocols:
                context.set_alpn_protocols(list(protocols))
            self._client[protocols] = context
        return context


def _load_chain(context: ssl.SSLContext, pem: bytes) -> None:
    """The ssl module reads keys from files only; an anonymous memory file is one."""
    descriptor = os.memfd_create("leaf", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def failure_text(error: BaseException) -> str:
    """One line on why a handshake failed, for a person; nothing of it comes from the peer's free text."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the upstream's certificate was not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"the TLS handshake failed: {error.reason or 'unknown'}"
    if isinstance(error, TimeoutError | ConnectionAbortedError):
        return "the TLS handshake did not finish in time"
    return "the connection was closed during the TLS handshake"
