"""The built image in an unmodified rootless Podman: the strongest rung there is, said truthfully, and it holds.

The upstream runs in the container itself, outside of the boundary, on every address: a direct connection that got out
would be answered.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import certificates
import pytest
import rootless

pytestmark = [pytest.mark.podman, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

INSIDE = pathlib.Path(__file__).parent / "inside"
RUN_TIMEOUT = 60.0
# How soon `podman stop` must be over for a workload that obeys SIGTERM; its own patience is set to more than that.
STOP_PROMPT, STOP_PATIENCE = 5.0, 30

DEFAULT: tuple[str, ...] = ()
BARE = ("--cap-drop=all", "--read-only", "--user=1000")
BARE_WITH_RUN_DIR = (*BARE, "--tmpfs=/run/openshell")
ARBITRARY_UID = ("--cap-drop=all", "--read-only", "--user=54321:54321")
PRIVATE_TMP_ONLY = (*BARE, "--read-only-tmpfs=false", "--tmpfs=/scratch", "--env=OPENSHELL_RUN_DIR=/scratch")


@dataclass(frozen=True)
class Outcome:
    """One finished container."""

    code: int
    stdout: str
    stderr: str
    status: dict[str, object]
    events: list[dict[str, object]]

    @property
    def report(self) -> dict[str, object]:
        """What the workload `requests.py` saw."""
        line = next((line for line in self.stdout.splitlines() if line.startswith("REPORT ")), None)
        assert line, f"the workload reported nothing\n{self.stdout}\n{self.stderr}"
        report: dict[str, object] = json.loads(line.removeprefix("REPORT "))
        return report

    @property
    def rung(self) -> object:
        """The rung that the status file names."""
        mode = self.status["network_mode"]
        assert isinstance(mode, dict)
        return mode["rung"]

    def layer(self, name: str) -> str:
        """The state of one layer in the status file."""
        layers = self.status["layers"]
        assert isinstance(layers, list)
        return str(next(item["state"] for item in layers if item["layer"] == name))


class Bench:
    """Starts containers of the image with the files of `inside/`, and removes them."""

    def __init__(self, host: rootless.RootlessHost, image: str, directory: pathlib.Path) -> None:
        self.host, self.image, self.directory = host, image, directory
        self.files, self.out = directory / "files", directory / "out"
        shutil.copytree(INSIDE, self.files, ignore=shutil.ignore_patterns("__pycache__"))
        certificates.write(self.files, "upstream.test")
        for path in (directory, self.files, *self.files.iterdir()):
            path.chmod(0o755)
        self.out.mkdir()
        self.out.chmod(0o777)  # whatever uid the container has, it writes its status file there
        self.started: list[str] = []

    def options(self, extra: tuple[str, ...], workload: tuple[str, ...]) -> list[str]:
        """The arguments of `podman run`, without --detach or --rm."""
        name = f"oss-e2e-{uuid.uuid4().hex[:12]}"
        self.started.append(name)
        mounts = [f"--volume={self.files}:/e2e:ro", f"--volume={self.out}:/out:rw"]
        entry = ["--entrypoint=/usr/bin/python3", self.image, "-I", "/e2e/entry.py"]
        return [f"--name={name}", *rootless.RUN_OPTIONS, *mounts, *extra, *entry, *workload]

    def run(self, extra: tuple[str, ...], *workload: str) -> Outcome:
        """Run a workload to its end."""
        done = self.host.podman("run", *self.options(extra, workload), timeout=RUN_TIMEOUT)
        status, events = self.out / "status.json", self.out / "events.jsonl"
        return Outcome(
            done.returncode,
            done.stdout,
            done.stderr,
            json.loads(status.read_text()) if status.exists() else {},
            [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else [],
        )

    def no_namespaces(self) -> tuple[str, ...]:
        """The options of a runtime whose seccomp profile refuses every new namespace, as Docker's default does."""
        return (*BARE, f"--security-opt=seccomp={self.files / 'no-namespaces.json'}")

    def start(self, extra: tuple[str, ...], *workload: str) -> str:
        """Start a workload in the background and return the container's name once it says WAITING."""
        name = self.host.podman("run", "--detach", *self.options(extra, workload), check=True).stdout.strip()
        deadline = time.monotonic() + RUN_TIMEOUT
        while "WAITING" not in (logs := self.host.podman("logs", name)).stdout:
            assert time.monotonic() < deadline, f"the workload never came up\n{logs.stdout}\n{logs.stderr}"
            assert self.state(name) == "running", f"the container ended\n{logs.stdout}\n{logs.stderr}"
            time.sleep(0.2)
        return self.started[-1]

    def state(self, name: str) -> str:
        """Podman's word for the container's state."""
        return self.host.podman("inspect", "--format={{.State.Status}}", name).stdout.strip()

    def exit_code(self, name: str) -> int:
        """The code that an ended container left."""
        return int(self.host.podman("inspect", "--format={{.State.ExitCode}}", name, check=True).stdout)

    def close(self) -> None:
        """Remove what was started."""
        for name in self.started:
            self.host.podman("rm", "--force", "--time=0", "--ignore", name)
        shutil.rmtree(self.directory, ignore_errors=True)


@pytest.fixture
def bench(podman_host: rootless.RootlessHost, image: str) -> Iterator[Bench]:
    """Containers of the image, with a directory to exchange files that the rootless user can enter."""
    made = Bench(podman_host, image, pathlib.Path(tempfile.mkdtemp(prefix="oss-e2e-")))
    yield made
    made.close()


def holds(outcome: Outcome) -> None:
    """The workload's side: what is allowed works, what is denied is refused with 403, and there is no way around."""
    report = outcome.report
    assert report["allowed"] == {"status": 200, "body": "upstream saw /public/a?token=secret"}, outcome.stderr
    denied, host = report["denied_path"], report["denied_host"]
    assert isinstance(denied, dict) and isinstance(host, dict) and isinstance(report["direct"], dict)
    assert denied["status"] == 403
    assert json.loads(denied["body"])["reason_id"]
    assert host["status"] != 200 and "403" in f"{host['status']} {host['body']}"
    assert {name: text for name, text in report["direct"].items() if text == "connected"} == {}
    supervisor = report["supervisor"]
    assert isinstance(supervisor, dict)
    assert {name: text for name, text in supervisor.items() if text not in {"EPERM", "EACCES"}} == {}
    assert report["descriptors"] in ([0, 1, 2, 3], [0, 1, 2]), "a descriptor was inherited (3 is the listing itself)"


def test_the_upstream_answers_where_there_is_no_boundary(bench: Bench) -> None:
    """The control: with `--network-mode host` the same direct connections are answered: a refusal says something."""
    outcome = bench.run(("--env=OPENSHELL_NETWORK_MODE=host",), "/e2e/requests.py")
    assert outcome.layer("network") != "enforced"
    assert outcome.rung == "observed"
    direct = outcome.report["direct"]
    assert isinstance(direct, dict)
    assert direct["upstream on loopback"] == direct["upstream on the container's address"] == "connected"


@pytest.mark.parametrize(
    "options",
    [DEFAULT, BARE, BARE_WITH_RUN_DIR, ARBITRARY_UID, PRIVATE_TMP_ONLY],
    ids=["default", "bare", "bare-run-tmpfs", "arbitrary-uid", "own-run-dir"],
)
def test_loopback_is_enforced_without_any_privilege(bench: Bench, options: tuple[str, ...]) -> None:
    """In `auto` the rung is loopback, the network layer is enforced, it holds, and the exit code is the workload's."""
    outcome = bench.run(options, "/e2e/requests.py")
    assert (outcome.rung, outcome.layer("network")) == ("loopback", "enforced"), outcome.stderr
    holds(outcome)
    assert outcome.code == 7
    printed = outcome.stdout + outcome.stderr
    assert "loopback" in printed and "enforced" in printed
    assert "secret" not in outcome.stderr + json.dumps(outcome.events), "a query string was logged"


@pytest.mark.parametrize(
    ("caps", "rungs"),
    [(("--cap-add=SYS_ADMIN",), {"loopback"}), (("--cap-add=SYS_ADMIN,NET_ADMIN",), {"veth"})],
    ids=["sys_admin", "sys_admin+net_admin"],
)
def test_more_capabilities_never_mean_less(bench: Bench, caps: tuple[str, ...], rungs: set[str]) -> None:
    """With CAP_SYS_ADMIN alone `lo` needs the user namespace all the same; with CAP_NET_ADMIN too there is veth."""
    outcome = bench.run(caps, "/e2e/requests.py")
    assert outcome.layer("network") == "enforced", outcome.stderr
    assert outcome.rung in rungs, outcome.stderr
    holds(outcome)
    assert outcome.code == 7


def test_as_root_the_workload_is_the_image_s_sandbox_user_and_can_not_touch_its_own_trust(bench: Bench) -> None:
    """Root's supervisor starts the workload as `sandbox`, who may read the certificates but plant nothing beside them."""
    report = bench.run(DEFAULT, "/e2e/requests.py").report
    assert (report["uid"], report["trust"]) == (1000, "EACCES")


def test_where_namespaces_are_refused_auto_runs_and_says_that_nothing_is_enforced(bench: Bench) -> None:
    """Under a Docker-like profile `auto` still starts, as `observed`: degraded, with the kernel's errno, and not a word more."""
    outcome = bench.run(bench.no_namespaces(), "/e2e/requests.py")
    assert outcome.code == 7, outcome.stderr
    assert (outcome.rung, outcome.layer("network")) == ("observed", "degraded")
    assert outcome.status["egress"] == "observe"
    assert "CONFIG:DEGRADED" in outcome.stderr and "EPERM" in outcome.stderr
    assert outcome.report["denied_path"] == {"status": 200, "body": "upstream saw /private"}


@pytest.mark.parametrize(
    "demand",
    ["--env=OPENSHELL_NETWORK_MODE=isolated", "--env=OPENSHELL_REQUIRE=network"],
    ids=["isolated", "require-network"],
)
def test_where_namespaces_are_refused_a_demand_for_them_is_fatal(bench: Bench, demand: str) -> None:
    """Who asked for isolation gets it or nothing: exit code 1, one screen that names the errno, the workload never started."""
    outcome = bench.run((*bench.no_namespaces(), demand), "/e2e/requests.py")
    assert outcome.code == 1, outcome.stderr
    assert "REPORT" not in outcome.stdout
    assert "EPERM" in outcome.stderr and "Traceback" not in outcome.stderr


@pytest.mark.parametrize("options", [DEFAULT, BARE], ids=["default", "bare"])
def test_podman_stop_ends_the_workload_in_time(bench: Bench, options: tuple[str, ...]) -> None:
    """SIGTERM reaches the workload through pid 1, its exit code becomes the container's, nobody is killed."""
    name = bench.start(options, "/e2e/waits.py")
    before = time.monotonic()
    bench.host.podman("stop", f"--time={STOP_PATIENCE}", name, timeout=STOP_PATIENCE + RUN_TIMEOUT, check=True)
    assert time.monotonic() - before < STOP_PROMPT
    assert bench.exit_code(name) == 5


def test_a_workload_that_ignores_sigterm_is_killed_after_the_grace(bench: Bench) -> None:
    """TERM, a grace, then KILL: the container ends by itself, before Podman loses patience, with 128+9."""
    name = bench.start(BARE, "/e2e/waits.py", "stubborn")
    before = time.monotonic()
    bench.host.podman("stop", f"--time={STOP_PATIENCE}", name, timeout=STOP_PATIENCE + RUN_TIMEOUT, check=True)
    assert time.monotonic() - before < STOP_PATIENCE
    assert bench.exit_code(name) == 128 + 9


def test_the_entrypoint_is_the_supervisor(podman_host: rootless.RootlessHost, image: str) -> None:
    """The image runs the supervisor, under both of its names, also as a uid without a passwd entry."""
    options = ("run", "--rm", *rootless.RUN_OPTIONS, *ARBITRARY_UID)
    version = podman_host.podman(*options, image, "--version")
    assert version.returncode == 0, version.stderr
    assert podman_host.podman(*options, "--entrypoint=openshell-sandbox", image, "--version").stdout == version.stdout


def test_nobody_but_root_can_change_what_is_run(podman_host: rootless.RootlessHost, image: str) -> None:
    """The prefix belongs to root and is writable to nobody else; bytecode is in place; no privileged helper is left."""
    script = """
        cd /opt/openshell-supervisor || exit 9
        find . \\( ! -user 0 -o ! -group 0 -o -perm /022 -o -perm /6000 \\) ! -type l
        find . /usr/local/bin -name '*redirector*' -o -name 'pip*' -path '*bin*'
        find lib/python3*/site-packages/openshell_supervisor -name '*.py' | while read -r file; do
            ls "${file%/*}"/__pycache__/"$(basename "${file%.py}")".*.pyc >/dev/null || echo "not compiled: $file"
        done
    """
    done = podman_host.podman("run", "--rm", *rootless.RUN_OPTIONS, "--entrypoint=/bin/sh", image, "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_interpreter_listens_to_nobody(podman_host: rootless.RootlessHost, image: str) -> None:
    """A module in the working directory or on PYTHONPATH of whoever starts the container is not imported (P44)."""
    names = "json.py sitecustomize.py argparse.py"
    trap = f"mkdir -p /tmp/t && cd /tmp/t && echo 'print(\"TRAPPED\")' | tee {names} >/dev/null"
    script = f"{trap} && PYTHONPATH=/tmp/t PYTHONSTARTUP=/tmp/t/json.py exec openshell-supervisor --version"
    done = podman_host.podman("run", "--rm", *rootless.RUN_OPTIONS, "--entrypoint=/bin/sh", image, "-c", script)
    assert done.returncode == 0, done.stderr
    assert "TRAPPED" not in done.stdout + done.stderr
