"""What is around us, by facts that are named: small file trees in the shape that each runtime's documentation and images show.

None of these runtimes is here (gVisor and rootless Podman are tried for real in tests/e2e); the files are written by hand.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import pytest

from openshell_supervisor.doctor import runtime
from openshell_supervisor.doctor.attempt import Outcome
from openshell_supervisor.doctor.checks import Check
from openshell_supervisor.doctor.files import Files

OVERLAY = "600 500 0:55 / / rw,relatime - overlay overlay rw,lowerdir={0},upperdir={0}/diff,workdir={0}/work\n"
DISK = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
PROC = "601 600 0:58 / /proc rw,nosuid - proc proc rw\n"
HOST_MAP = "         0          0 4294967295\n"
CLOUD_FLAGS = "flags\t\t: fpu vme de hypervisor lahf_lm\n"
METAL_FLAGS = "flags\t\t: fpu vme de lahf_lm\n"

DOCKER_STORE, PODMAN_STORE = "/var/lib/docker/overlay2/l/ABC", "/home/u/.local/share/containers/storage/overlay/l/X"
CONTAINERD_STORE = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/7/fs"
DOCKER_HOSTS = "610 600 8:1 /var/lib/docker/containers/0a1b/hosts /etc/hosts rw - ext4 /dev/sda1 rw\n"
POD_HOSTS = "610 600 8:1 /var/lib/kubelet/pods/9f/etc-hosts /etc/hosts rw - ext4 /dev/sda1 rw\n"
KATA_ROOT = "600 500 0:40 / / rw - virtiofs kataShared rw\n"


def look(
    root: pathlib.Path,
    files: Mapping[str, str | bytes],
    environment: Mapping[str, str] | None = None,
    *,
    log_says_gvisor: bool = False,
) -> dict[str, Check]:
    """The checks of a host that has these files and nothing else."""
    for path, content in {"/proc/self/uid_map": HOST_MAP, **files}.items():
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
    tries = {"kernel_log": Outcome(facts={"gvisor": log_says_gvisor})}
    return {check.id: check for check in runtime.checks(Files(root), environment or {}, tries)}


def mountinfo(*lines: str) -> dict[str, str]:
    """The file that shows these mounts."""
    return {"/proc/self/mountinfo": "".join(lines)}


CONTAINERS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "rootless Podman": (
        "podman",
        {
            **mountinfo(OVERLAY.format(PODMAN_STORE), PROC),
            "/run/.containerenv": 'engine="podman-5.4.2"\nname="agent"\nrootless=1\n',
            "/proc/self/cgroup": "0::/\n",
        },
        {"container": "podman"},
    ),
    "Podman with a cgroup path": (
        "podman",
        {**mountinfo(OVERLAY.format("/x"), PROC), "/proc/self/cgroup": "0::/user.slice/libpod-77aa.scope\n"},
        {},
    ),
    "Docker": (
        "docker",
        {
            **mountinfo(OVERLAY.format(DOCKER_STORE), PROC, DOCKER_HOSTS),
            "/.dockerenv": "",
            "/proc/self/cgroup": "0::/\n",
        },
        {},
    ),
    "Docker with cgroup v1": (
        "docker",
        {
            **mountinfo(OVERLAY.format("/x")),
            "/.dockerenv": "",
            "/proc/self/cgroup": "12:pids:/docker/0a1b\n1:name=systemd:/docker/0a1b\n",
        },
        {},
    ),
    "containerd": (
        "containerd",
        {
            **mountinfo(OVERLAY.format(CONTAINERD_STORE), POD_HOSTS),
            "/proc/self/cgroup": "0::/kubepods.slice/kubepods-pod9f.slice/cri-containerd-aa.scope\n",
            "/etc/hosts": "# Kubernetes-managed hosts file.\n127.0.0.1 localhost\n",
        },
        {"KUBERNETES_SERVICE_HOST": "10.96.0.1"},
    ),
    "CRI-O": (
        "cri-o",
        {
            **mountinfo(OVERLAY.format("/var/lib/containers/storage/overlay/l/Y"), POD_HOSTS),
            "/run/.containerenv": "",
            "/proc/self/cgroup": "0::/\n",
        },
        {"KUBERNETES_SERVICE_HOST": "10.96.0.1"},
    ),
    "systemd-nspawn": (
        "systemd-nspawn",
        mountinfo("1 0 8:1 /x / rw - ext4 /dev/sda1 rw\n"),
        {"container": "systemd-nspawn"},
    ),
    "none": ("none", {**mountinfo(DISK, PROC), "/proc/self/cgroup": "0::/init.scope\n"}, {}),
}


@pytest.mark.parametrize("host", CONTAINERS)
def test_a_container_runtime_is_known_by_its_facts(host: str, tmp_path: pathlib.Path) -> None:
    """The name, and at least one fact for it; none where there is none."""
    name, files, environment = CONTAINERS[host]
    check = look(tmp_path, files, environment)["runtime.container"]
    assert check.facts["name"] == name, check
    assert bool(check.facts["evidence"]) == (name != "none")


def test_a_marker_on_a_disk_is_no_container(tmp_path: pathlib.Path) -> None:
    """/.dockerenv stays in disk images made from containers. Above an overlay it counts, and says that it is alone."""
    disk = look(tmp_path / "disk", {**mountinfo(DISK), "/.dockerenv": ""})["runtime.container"]
    assert disk.facts["name"] == "none"
    assert "/.dockerenv exists, but the root is ext4" in disk.summary
    overlay = look(tmp_path / "overlay", {**mountinfo(OVERLAY.format("/x")), "/.dockerenv": ""})["runtime.container"]
    assert overlay.facts["name"] == "docker"
    assert "no other fact says so" in overlay.summary


def test_rootless_podman_says_so(tmp_path: pathlib.Path) -> None:
    """Of what a privileged container's marker holds, no names and ids are repeated; the map is what shows a rootless one."""
    _, files, environment = CONTAINERS["rootless Podman"]
    maps = "         0       1000          1\n         1     100000      65536\n"
    checks = look(tmp_path, {**files, "/proc/self/uid_map": maps}, environment)
    evidence = checks["runtime.container"].facts["evidence"]
    assert isinstance(evidence, list)
    assert {"engine=podman-5.4.2", "rootless=1"} <= set(evidence)
    assert "agent" not in str(evidence)
    users = checks["runtime.users"]
    assert (users.facts["mapped"], users.facts["count"]) == (True, 65537)
    assert "uid 0 here is uid 1000 outside" in users.summary


def test_the_machines_own_users_are_not_rootless(tmp_path: pathlib.Path) -> None:
    """The neighbour of the one before: the full map."""
    assert look(tmp_path, {})["runtime.users"].facts["mapped"] is False


KUBERNETES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "variable": ({}, {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}),
    "service account": ({"/var/run/secrets/kubernetes.io/serviceaccount/namespace": "default"}, {}),
    "kubelet's mounts": (mountinfo(POD_HOSTS), {}),
    "cgroup v1": ({"/proc/self/cgroup": "4:memory:/kubepods/besteffort/pod9f/aa\n"}, {}),
    "hosts file": ({"/etc/hosts": "# Kubernetes-managed hosts file.\n"}, {}),
}


@pytest.mark.parametrize("fact", KUBERNETES)
def test_kubernetes_is_known_by_any_of_its_facts(fact: str, tmp_path: pathlib.Path) -> None:
    """Each alone is enough, because a pod may hide the others; the address of the API server is not told."""
    files, environment = KUBERNETES[fact]
    check = look(tmp_path, files, environment)["runtime.orchestrator"]
    assert check.facts["name"] == "kubernetes"
    assert "10.96.0.1" not in str(check)


def test_without_its_facts_there_is_no_kubernetes(tmp_path: pathlib.Path) -> None:
    """A plain hosts file and a plain cgroup say nothing."""
    files = {"/etc/hosts": "127.0.0.1 localhost\n", "/proc/self/cgroup": "0::/system.slice/x.service\n"}
    assert look(tmp_path, files)["runtime.orchestrator"].facts["name"] == "none"


OLD_GVISOR = "Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016\n"
KERNELS: dict[str, tuple[str, dict[str, str], dict[str, str], bool]] = {
    "gVisor": ("gvisor", {"/proc/sys/kernel/osrelease": "4.19.0-gvisor\n", "/proc/sentry-meminfo": ""}, {}, True),
    "gVisor, older": ("gvisor", {"/proc/sys/kernel/osrelease": "4.4.0\n", "/proc/version": OLD_GVISOR}, {}, False),
    "gVisor by its log": ("gvisor", {"/proc/sys/kernel/osrelease": "4.4.0\n"}, {}, True),
    "a real 4.4.0": (
        "linux",
        {
            "/proc/sys/kernel/osrelease": "4.4.0-210-generic\n",
            "/proc/version": "Linux version 4.4.0-210-generic (buildd@lgw) #242-Ubuntu SMP Fri Apr 16 2021\n",
        },
        {},
        False,
    ),
    "WSL 2": (
        "wsl2",
        {
            "/proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2\n",
            "/proc/sys/fs/binfmt_misc/WSLInterop": "",
        },
        {"WSL_DISTRO_NAME": "Debian"},
        False,
    ),
    "a variable of WSL alone": ("linux", {"/proc/sys/kernel/osrelease": "6.12.0\n"}, {"WSL_DISTRO_NAME": "x"}, False),
    "Linux": ("linux", {"/proc/sys/kernel/osrelease": "6.12.0-amd64\n"}, {}, False),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_who_answers_as_the_kernel(kernel: str, tmp_path: pathlib.Path) -> None:
    """gVisor and WSL by what they alone say; what anybody could set is not enough."""
    name, files, environment, log = KERNELS[kernel]
    check = look(tmp_path, files, environment, log_says_gvisor=log)["runtime.kernel"]
    assert check.facts["name"] == name
    assert ("--declare-external" in check.hint) == (name == "gvisor")


FIRECRACKER_ACPI = b"FACP\x14\x01\x00\x00\x06fFIRECKFCVMFADT" + bytes(16)
QEMU_ACPI = b"FACP\xf4\x00\x00\x00\x03fBOCHS BXPC    " + bytes(16)
DMI = "/sys/class/dmi/id/"
MACHINES: dict[str, tuple[str, dict[str, str | bytes]]] = {
    "Firecracker by ACPI": (
        "firecracker",
        {"/proc/cpuinfo": CLOUD_FLAGS, "/sys/firmware/acpi/tables/FACP": FIRECRACKER_ACPI},
    ),
    "Firecracker by its command line": (
        "firecracker",
        {
            "/proc/cpuinfo": CLOUD_FLAGS,
            "/proc/cmdline": "reboot=k panic=1 pci=off root=/dev/vda virtio_mmio.device=4K@0xd0000000:5\n",
        },
    ),
    "another small machine": (
        "microvm",
        {"/proc/cpuinfo": CLOUD_FLAGS, "/proc/cmdline": "root=/dev/vda reboot=k panic=1\n"},
    ),
    "Kata": ("kata", {**mountinfo(KATA_ROOT), "/proc/cpuinfo": CLOUD_FLAGS, DMI + "sys_vendor": "QEMU\n"}),
    "Kata by its command line": (
        "kata",
        {"/proc/cmdline": "quiet systemd.unit=kata-containers.target agent.log=debug\n", "/proc/cpuinfo": CLOUD_FLAGS},
    ),
    "QEMU": (
        "virtual",
        {
            "/proc/cpuinfo": CLOUD_FLAGS,
            "/sys/firmware/acpi/tables/FACP": QEMU_ACPI,
            DMI + "sys_vendor": "QEMU\n",
            DMI + "product_name": "Standard PC (Q35 + ICH9, 2009)\n",
        },
    ),
    "a cloud on ARM": ("virtual", {"/proc/cpuinfo": "Features\t: fp asimd\n", DMI + "sys_vendor": "Amazon EC2\n"}),
    "a real machine": (
        "physical",
        {"/proc/cpuinfo": METAL_FLAGS, DMI + "sys_vendor": "LENOVO\n", DMI + "product_name": "ThinkSystem\n"},
    ),
    "nothing to go by": ("unknown", {"/proc/cpuinfo": "Features\t: fp asimd\n"}),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_machine_is_known_by_its_facts(machine: str, tmp_path: pathlib.Path) -> None:
    """Kata before the machine that it runs on; the kernel's command line is looked at and not repeated."""
    name, files = MACHINES[machine]
    check = look(tmp_path, files)["runtime.machine"]
    assert check.facts["name"] == name, check
    assert "root=/dev/vda" not in str(check)


def test_beneath_gvisor_nothing_is_claimed(tmp_path: pathlib.Path) -> None:
    """gVisor invents its own /proc: what it shows says nothing of the machine."""
    files = {"/proc/sys/kernel/osrelease": "4.19.0-gvisor\n", "/proc/cpuinfo": CLOUD_FLAGS}
    assert look(tmp_path, files)["runtime.machine"].facts["name"] == "unknown"
