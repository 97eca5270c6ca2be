"""A real Open Policy Agent for the tests: built by scripts/opa, pinned, and run on a socket or a port."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD_TIMEOUT = 900.0  # 75 s on two idle cores; it runs at the lowest priority beside other tests
START_TIMEOUT = 20.0


def missing() -> str:
    """Why there can be no OPA here, or an empty string."""
    return "" if shutil.which("go", path=search_path()) else "needs the client program go to build OPA"


def search_path() -> str:
    """PATH, and where Go's own archive puts it."""
    return f"{os.environ.get('PATH', '')}:/usr/local/go/bin"


def build() -> pathlib.Path:
    """The program, from the cache or built now. Raises `RuntimeError` with what the build said."""
    done = subprocess.run(
        [ROOT / "scripts/opa"],
        env=os.environ | {"PATH": search_path()},
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-400:])
    return pathlib.Path(done.stdout.strip())


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Opa:
    """One server process at `url`; `start` waits until it answers, `stop` until it is gone."""

    program: pathlib.Path
    url: str
    arguments: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def listens_at(self) -> str:
        """The address as OPA's --addr takes it."""
        return self.url.replace("unix:", "unix://") if self.url.startswith("unix:") else self.url.partition("//")[2]

    def start(self) -> None:
        """Run it. Raises `RuntimeError` where it does not come up."""
        self.process = subprocess.Popen(
            [
                self.program,
                *["run", "--server", "--skip-version-check", "--log-level=error", "--addr"],
                self.listens_at,
                *self.arguments,
            ],
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_TIMEOUT
        while not self.listening():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"OPA does not listen at {self.url}")
            time.sleep(0.02)

    def listening(self) -> bool:
        """Does anything accept there?"""
        unix = self.url.startswith("unix:")
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as probe:
            host, _, port = self.listens_at.rpartition(":")
            try:
                probe.connect(self.url.removeprefix("unix:") if unix else (host, int(port)))
            except OSError:
                return False
            return True

    def stop(self) -> None:
        """End it at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        if self.url.startswith("unix:"):
            pathlib.Path(self.url.removeprefix("unix:")).unlink(missing_ok=True)
