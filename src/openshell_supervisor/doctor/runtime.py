"""What this process runs in: container runtime, Kubernetes, another kernel than Linux, a virtual machine, mapped users.

Every answer names the facts that it rests on, and a fact that could come from elsewhere is never enough alone: /.dockerenv, for
one, stays in every disk image that was made from a container. Values that may be secret (addresses, the kernel's command line)
are looked at and not repeated.
"""

from __future__ import annotations

from collections.abc import Mapping

from openshell_supervisor.doctor.attempt import Outcome
from openshell_supervisor.doctor.checks import Check, Severity, State, info
from openshell_supervisor.doctor.files import Files, Mount, mounts
from openshell_supervisor.doctor.surroundings import at

# Where the runtimes keep what they mount into a container: a part of a mount's root, source or options, and whose it is.
PLACES = (
    ("/docker/containers/", "docker"),
    ("/docker/overlay2/", "docker"),
    ("/containers/storage/overlay", "podman"),
    ("/overlay-containers/", "podman"),
    ("/io.containerd.", "containerd"),
)
CGROUPS = (
    ("/libpod-", "podman"),
    ("/docker/", "docker"),
    ("/docker-", "docker"),
    ("/cri-containerd-", "containerd"),
    ("/crio-", "cri-o"),
    ("/lxc/", "lxc"),
    ("/machine.slice/machine-", "systemd-nspawn"),
)
# The variable `container` of systemd's container interface; "oci" is what CRI-O and some builders say.
ANNOUNCED = {"podman": "podman", "docker": "docker", "lxc": "lxc", "systemd-nspawn": "systemd-nspawn"}
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
# gVisor's Sentry answers a release that ends in "-gvisor"; before 2025 it was this one, whatever the host was.
GVISOR_RELEASE, GVISOR_VERSION = "4.4.0", "#1 SMP Sun Jan 10 15:06:54 PST 2016"
GVISOR_FILE = "/proc/sentry-meminfo"
# ACPI's FADT: the OEM id is at offset 10, six bytes (ACPI specification, 5.2.6); Firecracker writes its own.
OEM_ID = slice(10, 16)


def checks(files: Files, environment: Mapping[str, str], tries: Mapping[str, Outcome]) -> list[Check]:
    """Everything about what is around us."""
    mounted = mounts(files)
    kubernetes = _kubernetes(files, environment, mounted)
    kernel = _kernel(files, environment, tries["kernel_log"])
    return [
        _container(files, environment, mounted, in_kubernetes=bool(kubernetes)),
        _named("runtime.orchestrator", "kubernetes" if kubernetes else "none", kubernetes, "no sign of Kubernetes"),
        kernel,
        _machine(files, mounted, kernel),
        _users(files),
    ]


def _named(identifier: str, name: str, evidence: list[str], otherwise: str) -> Check:
    summary = f"{name}: {'; '.join(evidence)}" if evidence else otherwise
    return info(identifier, summary, name=name, evidence=evidence)


def _container(files: Files, environment: Mapping[str, str], mounted: list[Mount], *, in_kubernetes: bool) -> Check:
    """The runtime that most facts speak for; markers alone count only where the root is no disk of its own."""
    strong = _mount_facts(mounted) + _cgroup_facts(files)
    announced = environment.get("container", "")
    if announced in ANNOUNCED:
        strong.append((ANNOUNCED[announced], f"the variable container is {announced}"))
    markers = [
        (name, f"{path} exists")
        for name, path in (("podman", "/run/.containerenv"), ("docker", "/.dockerenv"))
        if files.exists(path)
    ]
    root = at(mounted, "/")
    on_disk = root is not None and root.source.startswith("/dev/")
    if not strong and markers and on_disk and root is not None:
        said = f"{markers[0][1]}, but the root is {root.kind} on {root.source}: a disk image made from a container, or a copy"
        return info("runtime.container", f"none: {said}", name="none", evidence=[said])
    found = strong + markers
    if not found:
        return _named("runtime.container", "none", [], "no sign of a container")
    name = max({name for name, _ in found}, key=lambda one: sum(one == name for name, _ in found))
    if name == "podman" and in_kubernetes:
        name = "cri-o"  # it keeps its containers where Podman does, and makes the same marker
    evidence = list(dict.fromkeys(text for _, text in found))
    if name == "podman":
        evidence += _containerenv(files)
    if not strong:
        evidence.append("no other fact says so")
    return _named("runtime.container", name, evidence, "")


def _mount_facts(mounted: list[Mount]) -> list[tuple[str, str]]:
    found = {}
    for mount in mounted:
        for part, name in PLACES:
            if part in f"{mount.root} {mount.source} {mount.super_options}" and name not in found:
                found[name] = f"{mount.point} is mounted from a place of {name} ({part.strip('/')})"
    return list(found.items())


def _cgroup_facts(files: Files) -> list[tuple[str, str]]:
    paths = " ".join(files.lines("/proc/self/cgroup"))
    return [(name, f"the cgroup's path has {part.strip('/')}") for part, name in CGROUPS if part in paths]


def _containerenv(files: Files) -> list[str]:
    """What Podman writes into its marker of privileged containers; of the others it is empty."""
    wanted = ("engine=", "rootless=")
    return [line.replace('"', "") for line in files.lines("/run/.containerenv") if line.startswith(wanted)]


def _kubernetes(files: Files, environment: Mapping[str, str], mounted: list[Mount]) -> list[str]:
    found = []
    if "KUBERNETES_SERVICE_HOST" in environment:
        found.append("the variable KUBERNETES_SERVICE_HOST is set")
    if files.exists(SERVICE_ACCOUNT):
        found.append(f"{SERVICE_ACCOUNT} exists")
    if any("/kubelet/pods/" in mount.root for mount in mounted):
        found.append("files are mounted from the kubelet's directory")
    if "kubepods" in " ".join(files.lines("/proc/self/cgroup")):
        found.append("the cgroup's path has kubepods")
    if any("Kubernetes-managed" in line for line in files.lines("/etc/hosts")[:1]):
        found.append("/etc/hosts is managed by Kubernetes")
    return found


def _kernel(files: Files, environment: Mapping[str, str], log: Outcome) -> Check:
    """Linux, or somebody who answers in its place."""
    name = "runtime.kernel"
    release = files.word("/proc/sys/kernel/osrelease") or ""
    gvisor = _gvisor(files, release, log)
    if gvisor:
        hint = (
            "gVisor has no Landlock, and a network namespace is of use only with its own stack (--network=sandbox); "
            "--declare-external says that it owns a layer, OPENSHELL_BEST_EFFORT_FAILURES tolerates what it refuses"
        )
        facts = {"name": "gvisor", "evidence": gvisor}
        return Check(name, State.INFO, Severity.NONE, f"gvisor: {'; '.join(gvisor)}", hint, facts)
    wsl = [text for text, present in _wsl(files, environment, release) if present]
    if wsl and "microsoft" in release.lower():
        return _named(name, "wsl2" if "wsl2" in release.lower() else "wsl", wsl, "")
    return _named(name, "linux", [], "Linux itself: no sign of gVisor or WSL")


def _gvisor(files: Files, release: str, log: Outcome) -> list[str]:
    found = []
    if release.endswith("-gvisor"):
        found.append(f"the kernel's release is {release}")
    version = files.word("/proc/version") or ""
    if GVISOR_VERSION in version and GVISOR_RELEASE in version:
        found.append(f"/proc/version says {GVISOR_RELEASE} {GVISOR_VERSION}, as gVisor does everywhere")
    if files.exists(GVISOR_FILE):
        found.append(f"{GVISOR_FILE} exists")
    if log.facts.get("gvisor") is True:
        found.append("the kernel's log says gVisor")
    return found


def _wsl(files: Files, environment: Mapping[str, str], release: str) -> list[tuple[str, bool]]:
    return [
        (f"the kernel's release is {release}", "microsoft" in release.lower()),
        ("/proc/sys/fs/binfmt_misc/WSLInterop exists", files.exists("/proc/sys/fs/binfmt_misc/WSLInterop")),
        ("the variable WSL_DISTRO_NAME is set", "WSL_DISTRO_NAME" in environment),
    ]


def _machine(files: Files, mounted: list[Mount], kernel: Check) -> Check:
    name = "runtime.machine"
    if kernel.facts["name"] == "gvisor":
        return info(name, "what lies beneath gVisor cannot be seen from here", name="unknown", evidence=[])
    kata = [text for text, present in _kata(files, mounted) if present]
    if kata:
        return _named(name, "kata", kata, "")
    virtual = (
        "hypervisor" in next((line for line in files.lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    )
    flag = ["/proc/cpuinfo has the flag hypervisor"] if virtual else []
    firecracker = _firecracker(files)
    if firecracker:
        return _named(name, "firecracker", firecracker + flag, "")
    vendor, product = (files.word(f"/sys/class/dmi/id/{one}") for one in ("sys_vendor", "product_name"))
    if vendor or product:
        evidence = [f"DMI says {' '.join(word for word in (vendor, product) if word)}", *flag]
        return _named(name, "virtual" if virtual or _virtual_vendor(vendor, product) else "physical", evidence, "")
    if virtual:
        return _named(
            name, "microvm", [*flag, "no DMI: a small virtual machine (Firecracker, Cloud Hypervisor, libkrun)"], ""
        )
    return info(name, "nothing says whether this machine is virtual", name="unknown", evidence=[])


def _kata(files: Files, mounted: list[Mount]) -> list[tuple[str, bool]]:
    line = files.text("/proc/cmdline") or ""
    return [
        ("a file system comes from kataShared", any(mount.source == "kataShared" for mount in mounted)),
        ("the kernel's command line names kata-containers", "kata-containers" in line),
        ("the kernel's command line has settings of Kata's agent", " agent.log" in line or " agent.debug" in line),
    ]


def _firecracker(files: Files) -> list[str]:
    found = []
    if files.head("/sys/firmware/acpi/tables/FACP", 16)[OEM_ID] == b"FIRECK":
        found.append("the ACPI tables are by FIRECK")
    words = (files.text("/proc/cmdline") or "").lower()
    if "firecracker" in words:
        found.append("the kernel's command line names firecracker")
    if "virtio_mmio.device=" in words and not files.exists("/sys/class/dmi/id"):
        found.append("the kernel's command line lists virtio_mmio devices, and there is no DMI")
    return found


def _virtual_vendor(*words: str | None) -> bool:
    known = ("qemu", "kvm", "vmware", "virtualbox", "virtual machine", "google compute engine", "amazon ec2", "xen")
    return any(one in (word or "").lower() for word in words for one in known)


def _users(files: Files) -> Check:
    """Is uid 0 here the machine's? A map that does not begin with "0 0" says that somebody else is (user_namespaces(7))."""
    extents = [tuple(map(int, line.split())) for line in files.lines("/proc/self/uid_map")]
    name = "runtime.users"
    facts = {"extents": len(extents), "count": sum(extent[2] for extent in extents)}
    if not extents:
        return info(name, "/proc/self/uid_map shows no user namespace", mapped=None, **facts)
    if extents[0][:2] == (0, 0):
        return info(name, "users are those of the machine: no user namespace around us", mapped=False, **facts)
    outside = next((extent[1] for extent in extents if extent[0] == 0), None)
    root = f"uid 0 here is uid {outside} outside" if outside is not None else "uid 0 is not mapped"
    return info(name, f"inside of a user namespace (rootless): {root}, {facts['count']} users", mapped=True, **facts)
