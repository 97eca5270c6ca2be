"""The certificate authority of one sandbox: made at start, kept in memory, gone with the process.

Its key never touches a disk; what is written is the certificate and a bundle of everything the workload should trust.
Leaves are for the CONNECT host and no other name, on a key of their own, so that a leaf's holder cannot sign.
cryptography is imported when the authority is made, not before. This room opens no connection.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
import select
import stat
import sys
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from openshell_supervisor.errors import ProxyError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

COMMON_NAME = "OpenShell Sandbox CA"
ORGANIZATION = "OpenShell"
# Public CAs may issue for 200 days at most since March 2026 (CA/Browser Forum ballot SC-081v3); clients start to insist.
LEAF_VALIDITY = datetime.timedelta(days=199)
# The sandbox is gone long before; some clients refuse dates beyond 2049 (UTCTime).
CA_VALIDITY = datetime.timedelta(days=3650)
# Clocks in containers and VMs lag.
BACKDATE = datetime.timedelta(days=2)
# Upstream's cache size (proxy.md 2.5); a leaf in PEM is about 1 KiB.
MAX_LEAVES = 256
# A process that makes an authority needs 50–100 ms; a loaded machine has been seen to need a second.
MAKING_TIMEOUT = 10.0
# RFC 5280 upper bound of a common name.
_MAX_COMMON_NAME = 64

# The bundles that upstream looks for, in its order (proxy.md 2.5).
SYSTEM_BUNDLES = (
    Path("/etc/ssl/certs/ca-certificates.crt"),
    Path("/etc/pki/tls/certs/ca-bundle.crt"),
    Path("/etc/ssl/ca-bundle.pem"),
    Path("/etc/ssl/cert.pem"),
)
CA_FILE = "openshell-ca.pem"
BUNDLE_FILE = "ca-bundle.pem"


@dataclass(frozen=True, slots=True)
class TrustFiles:
    """Where the workload finds its trust: the CA alone, and the bundle of all roots with it."""

    ca: Path
    bundle: Path


class CertificateAuthority:
    """A private EC P-256 authority. Make it with `create`, or have a process make it with `begin`.

    `pem` holds three blocks: its key, the key of all leaves, its certificate. They are parsed when the first leaf is signed.
    """

    def __init__(self, pem: bytes) -> None:
        key, leaf_key, certificate = _blocks(pem)
        self._key_pem = key
        self._leaf_key_pem = leaf_key
        self._leaves: OrderedDict[str, bytes] = OrderedDict()
        self.ca_pem: bytes = certificate

    @classmethod
    def create(cls) -> CertificateAuthority:
        """A new authority with fresh keys; about a millisecond once cryptography is imported."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(COMMON_NAME)
        now = datetime.datetime.now(datetime.UTC)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + CA_VALIDITY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(
            _private(key)
            + _private(ec.generate_private_key(ec.SECP256R1()))
            + certificate.public_bytes(serialization.Encoding.PEM)
        )

    @cached_property
    def _material(self) -> tuple[EllipticCurvePrivateKey, x509.Certificate, EllipticCurvePublicKey]:
        """The signing key, the certificate, and the public key of the leaves."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key(self._key_pem, None)
        leaf_key = serialization.load_pem_private_key(self._leaf_key_pem, None)
        certificate = x509.load_pem_x509_certificate(self.ca_pem)
        return cast("EllipticCurvePrivateKey", key), certificate, cast("EllipticCurvePrivateKey", leaf_key).public_key()

    def load(self) -> None:
        """Sign a leaf for a name that nobody has, so that the first real one does not wait for what cryptography imports."""
        self._sign_leaf("warm.invalid")

    def leaf_pem(self, host: str) -> bytes:
        """Key, leaf and CA as one PEM for a TLS server that calls itself `host` (a lower-case name or an IP address)."""
        cached = self._leaves.get(host)
        if cached is not None:
            self._leaves.move_to_end(host)
            return cached
        pem = self._leaf_key_pem + self._sign_leaf(host) + self.ca_pem
        self._leaves[host] = pem
        if len(self._leaves) > MAX_LEAVES:
            self._leaves.popitem(last=False)
        return pem

    def _sign_leaf(self, host: str) -> bytes:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.x509.oid import ExtendedKeyUsageOID

        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        now = datetime.datetime.now(datetime.UTC)
        key, certificate, leaf_key = self._material
        authority = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return (
            x509.CertificateBuilder()
            .subject_name(_name(host[:_MAX_COMMON_NAME]))
            .issuer_name(certificate.subject)
            .public_key(leaf_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now - BACKDATE + LEAF_VALIDITY)
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
            .sign(key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )

    def bundle_pem(self, extra: Path | None) -> bytes:
        """System roots, the operator's `extra` roots and this CA, concatenated. Raises `ProxyError` for an unreadable `extra`."""
        return b"".join(
            part if part.endswith(b"\n") else part + b"\n" for part in (*trusted_roots(extra), self.ca_pem) if part
        )

    def write(self, run_dir: Path, extra: Path | None = None) -> TrustFiles:
        """Write both files into `run_dir` (made if missing, never followed through a symbolic link), mode 0644, atomically.

        Raises `ProxyError` naming the file and the errno.
        """
        try:
            run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
            directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise _unwritable(run_dir, error) from error
        try:
            # The operator's roots stand behind ours for clients that add to their own trust and never read the bundle.
            own = self.ca_pem + (extra.read_bytes() if extra is not None else b"")
            _replace(directory, CA_FILE, own)
            _replace(directory, BUNDLE_FILE, self.bundle_pem(extra))
        except OSError as error:
            raise _unwritable(run_dir, error) from error
        finally:
            os.close(directory)
        return TrustFiles(run_dir / CA_FILE, run_dir / BUNDLE_FILE)


def _private(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _blocks(pem: bytes) -> list[bytes]:
    """The PEM blocks of a text, each with its newline. Raises ValueError unless there are three."""
    blocks = re.findall(rb"-----BEGIN [A-Z ]+-----\n.*?-----END [A-Z ]+-----\n", pem, re.DOTALL)
    if len(blocks) != 3:
        raise ValueError(f"an authority has three PEM blocks, not {len(blocks)}")
    return blocks


def begin() -> int:
    """Start a process that makes an authority on another core; answers the descriptor where `finish` reads it.

    cryptography takes 30 ms to import, a third of the way to the workload's first instruction. The key comes through a pipe
    between our own processes, before any workload exists. Raises OSError.
    """
    reading, writing = os.pipe()
    try:
        argv = [sys.executable, "-I", "-m", __name__]
        os.posix_spawn(argv[0], argv, {}, file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1)])
    finally:
        os.close(writing)
    return reading


def finish(reading: int | None) -> CertificateAuthority:
    """The authority that a process begun earlier writes; made here where there is none, or it failed. Blocks; for a thread."""
    pem = b""
    if reading is not None:
        with os.fdopen(reading, "rb") as pipe:
            ready, _, _ = select.select([pipe], [], [], MAKING_TIMEOUT)
            pem = pipe.read() if ready else b""
    try:
        return CertificateAuthority(pem)
    except ValueError:
        return CertificateAuthority.create()


def trusted_roots(extra: Path | None) -> tuple[bytes, ...]:
    """The roots that the supervisor itself verifies upstreams with: the first system bundle there is, and `extra`."""
    system = next((path for path in SYSTEM_BUNDLES if path.is_file()), None)
    parts = [system.read_bytes()] if system is not None else []
    if extra is not None:
        try:
            parts.append(extra.read_bytes())
        except OSError as error:
            raise ProxyError(
                f"cannot read the upstream CA file {extra}: {error.strerror}",
                code="upstream_ca_unreadable",
                hint="give --upstream-ca a PEM file that the supervisor may read",
            ) from error
    return tuple(parts)


def _replace(directory: int, name: str, content: bytes) -> None:
    """Write beside and rename over: a reader sees the old file or the new one, and a link in its place is not followed."""
    temporary = f".{name}.{secrets.token_hex(8)}"
    mode = stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH
    file = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory
    )
    try:
        with os.fdopen(file, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(temporary, dir_fd=directory)
        raise


def _unwritable(run_dir: Path, error: OSError) -> ProxyError:
    return ProxyError(
        f"cannot write the trust files into {run_dir}: {error.strerror}",
        code="trust_files_unwritable",
        hint="the run directory must be a real directory that the supervisor may write",
    )


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    attributes = [
        x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
    ]
    return x509.Name(attributes)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


if __name__ == "__main__":
    made = CertificateAuthority.create()
    sys.stdout.buffer.write(made._key_pem + made._leaf_key_pem + made.ca_pem)
