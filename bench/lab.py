"""What every contender needs: certificates, the upstream process, the policy and the equivalent allow-list.

The directory is readable by everybody, because a workload may run as somebody else; it holds no secret that outlives
the run.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from bench import certificates
from bench.processes import Child

ZONE = "bench.example"
PLAIN_HOST = f"plain.{ZONE}"
TLS_HOST = f"tls.{ZONE}"
TUNNEL_HOST = f"tunnel.{ZONE}"
MANY_HOSTS = f"h{{}}.many.{ZONE}"
START_TIMEOUT_S = 20.0
SOURCE = Path(__file__).parent
WORKLOAD_FILES = ("load.py", "first.py")

RULE = """\
  {name}:
    name: {name}
    endpoints:
      - host: "{host}"
        port: {port}
{extra}
    binaries: [{{path: "/**"}}]
"""
REST = """\
        protocol: rest
        enforcement: enforce
        rules: [{allow: {method: GET, path: "/v1/**"}}]"""


class Lab:
    """A context: enter to have everything running, leave to have nothing left."""

    def __init__(self, tls_hosts: int) -> None:
        self.tls_hosts = tls_hosts
        self.directory = Path(tempfile.mkdtemp(prefix="openshell-bench-"))
        self.directory.chmod(0o755)
        self.ca, self._leaf, self._key = certificates.write(self.directory, [TLS_HOST, f"*.many.{ZONE}"])
        self.ports: dict[str, int] = {}
        self._logs = 0

    def __enter__(self) -> Lab:
        for name in WORKLOAD_FILES:
            shutil.copyfile(SOURCE / name, self.directory / name)
        argv = (sys.executable, str(SOURCE / "upstream.py"), str(self._leaf), str(self._key))
        self._upstream = Child(argv, log=self.log("upstream"))
        self.ports = json.loads(self._upstream.line(START_TIMEOUT_S))
        self.policy = self._write("policy.yaml", self._policy())
        self.confining = self._write("confining.yaml", self._policy() + "filesystem_policy: {include_workdir: true}\n")
        self.allow = self._write("allow.json", json.dumps(self._allow_list()))
        return self

    def __exit__(self, *_: object) -> None:
        self._upstream.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log(self, name: str) -> Path:
        """A fresh file for the standard error of a child."""
        self._logs += 1
        return self.directory / f"{self._logs:03}-{name}.log"

    def file(self, name: str) -> str:
        """The path of a file in the laboratory, as an argument."""
        return str(self.directory / name)

    def resolves(self, *, many: bool) -> list[str]:
        """The supervisor's `--resolve` arguments; `many` adds the names of the memory row."""
        names = [PLAIN_HOST, TLS_HOST, TUNNEL_HOST]
        if many:
            names += [MANY_HOSTS.format(number) for number in range(self.tls_hosts)]
        return [argument for name in names for argument in ("--resolve", f"{name}=127.0.0.1")]

    def _write(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.write_text(text)
        return path

    def _policy(self) -> str:
        rules = (
            ("plain", PLAIN_HOST, "http", REST),
            ("tls", TLS_HOST, "https", REST),
            ("many", f"*.many.{ZONE}", "https", REST),
            ("tunnel", TUNNEL_HOST, "bulk", "        tls: skip"),
        )
        texts = (
            RULE.format(name=name, host=host, port=self.ports[port], extra=extra) for name, host, port, extra in rules
        )
        return "version: 1\nnetwork_policies:\n" + "".join(texts)

    def _allow_list(self) -> list[dict[str, object]]:
        """The same policy for mitmdump."""
        rest = {"methods": ["GET"], "path": "/v1/*"}
        return [
            {"host": PLAIN_HOST, "port": self.ports["http"], **rest},
            {"host": TLS_HOST, "port": self.ports["https"], **rest},
            {"host": f"*.many.{ZONE}", "port": self.ports["https"], **rest},
            {"host": TUNNEL_HOST, "port": self.ports["bulk"], "methods": [], "path": ""},
        ]
