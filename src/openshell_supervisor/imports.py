"""Code that is loaded once and for all, for a supervisor whose files are in the workload's hands.

A plain user who runs the supervisor from an environment of their own owns its code, and so does the workload of the same user.
Read-only mounts do not reach every way to a file (a hard link, a second name), so in that case everything is imported before
the workload exists, and nothing afterwards: what would be imported later fails, and the request that wanted it is refused.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# What is otherwise imported when it is first needed, besides what the proxy's warm-up loads: our own late rooms, and what the
# standard library and the packages we use import inside functions.
LATE = (
    "openshell_supervisor.callers.lookup",
    "openshell_supervisor.proxy.http_session",
    "openshell_supervisor.proxy.connect",
    "openshell_supervisor.verdict.decide",
    "openshell_supervisor.verdict.engines.embedded",
    "openshell_supervisor.boundary.veth",
    "openshell_supervisor.boundary.rtnetlink",
    "asyncio.sslproto",
    "concurrent.futures.thread",
    "cryptography.hazmat.backends.openssl.backend",
    "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.x509",
    "cryptography.x509.oid",
    "difflib",
    "encodings.ascii",
    "encodings.cp437",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.punycode",
    "linecache",
    "msgspec",
    "structlog",
    "structlog.dev",
    "traceback",
    "unicodedata",
)


class _Refusal:
    """A finder that finds nothing and says why."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raises ImportError for whatever is asked."""
        raise ImportError(f"{name} was not loaded before the workload, which may rewrite it", name=name)


def load() -> None:
    """Import everything of `LATE`; for a thread. What a build of Python lacks is left out: it cannot be rewritten either."""
    for name in LATE:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue


def seal() -> None:
    """From now on no module comes from a file any more. Modules that are loaded stay usable."""
    sys.meta_path.insert(0, _Refusal())
    sys.path.clear()
    sys.path_importer_cache.clear()
