"""The lists of paths: what the baseline adds, and what it may never make writable. Pure, over an imagined file system."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openshell_supervisor.confine import baseline
from openshell_supervisor.confine.baseline import FileRules, beneath, normal
from openshell_supervisor.policy.defaults import default_policy
from openshell_supervisor.policy.model import FilesystemPolicy, LandlockPolicy, SandboxPolicy

DEBIAN = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/var/log", "/tmp")
DEVICES = (
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/ptmx",
    "/dev/pts",
    "/dev/shm",
)


@dataclass(frozen=True)
class Image:
    """An imagined file system: the paths that exist, and the links among them."""

    paths: tuple[str, ...] = (*DEBIAN, *DEVICES)
    links: Mapping[str, str] = field(default_factory=dict)

    def exists(self, path: str) -> bool:
        return path in self.paths or path in self.links

    def names(self, directory: str) -> Iterable[str]:
        return [posixpath.basename(path) for path in self.paths if posixpath.dirname(path) == directory]

    def real(self, path: str) -> str:
        for link, target in self.links.items():
            if beneath(path, link):
                return target + path[len(link) :]
        return path

    def rules(
        self,
        read_only: Iterable[str] = (),
        read_write: Iterable[str] = (),
        *,
        include_workdir: bool | None = False,
        workdir: str | None = None,
        standing_in: str = "/",
        run: tuple[str, ...] = (),
        policy: SandboxPolicy | None = None,
    ) -> FileRules:
        """What `file_rules` makes of these lists, or of `policy`, on this image."""
        section = FilesystemPolicy(include_workdir, tuple(read_only), tuple(read_write))
        return baseline.file_rules(
            policy or SandboxPolicy(filesystem=section),
            workdir=workdir,
            standing_in=standing_in,
            readable=run,
            exists=self.exists,
            names=self.names,
            real=self.real,
        )


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (SandboxPolicy(), False),
        (SandboxPolicy(filesystem=FilesystemPolicy()), True),
        (SandboxPolicy(landlock=LandlockPolicy()), True),
        (default_policy(), True),
    ],
)
def test_files_are_restricted_when_the_policy_asks(policy: SandboxPolicy, wanted: bool) -> None:
    """Either section asks for it, even an empty one; a policy with neither does not."""
    assert baseline.asked(policy) is wanted


def test_the_baseline_is_added_as_far_as_it_exists() -> None:
    """Every path of the baseline that the image has is there, in its list, and called added; no other one is."""
    full = Image().rules()
    assert set(full.read_only) == {path for path in DEBIAN if path != "/tmp"} | {"/dev/urandom"}
    assert set(full.read_write) == {"/tmp", *DEVICES} - {"/dev/urandom"}
    assert full.added == (*full.read_only, *full.read_write)
    assert full.notes == ()
    poor = Image(("/usr", "/dev/null")).rules()
    assert (poor.read_only, poor.read_write) == (("/usr",), ("/dev/null",))
    assert Image(()).rules() == FileRules((), (), (), ())


def test_the_default_policy_keeps_its_order_and_gets_the_rest() -> None:
    """What the policy lists stays first, once and not as added, also where the image lacks it; the rest comes behind it."""
    made = Image().rules(policy=default_policy(), standing_in="/srv/project")
    assert made.read_only[:7] == ("/usr", "/lib", "/proc", "/dev/urandom", "/app", "/etc", "/var/log")
    assert made.read_write[:2] == ("/tmp", "/dev/null")
    assert made.read_write[-1] == "/srv/project"
    assert not {"/usr", "/app", "/tmp", "/srv/project"} & set(made.added)
    assert {"/bin", "/dev/pts"} <= set(made.added)


def test_run_directories_are_readable() -> None:
    """The directory with the certificates is read-only and added, unless a writable one has the same name."""
    image = Image((*DEBIAN, "/run/openshell/run-1"))
    assert "/run/openshell/run-1" in image.rules(run=("/run/openshell/run-1/",)).added
    assert (
        "/run/openshell/run-1"
        not in image.rules((), ("/run/openshell/run-1",), run=("/run/openshell/run-1",)).read_only
    )


@pytest.mark.parametrize(
    ("written", "comes_to"),
    [
        ("/usr/", "/usr"),
        ("//usr", "/usr"),
        ("/usr//lib/./x/", "/usr/lib/x"),
        ("/", "/"),
        ("/.", "/"),
        ("///", "/"),
        ("/a/../b", "/a/../b"),
        ("relative", "relative"),
    ],
)
def test_paths_are_normalised_by_their_text(written: str, comes_to: str) -> None:
    """Doubled and final separators and `.` go, `..` stays; doing it twice changes nothing."""
    assert normal(written) == comes_to
    assert normal(comes_to) == comes_to


def test_one_path_is_in_one_list_once() -> None:
    """However often and however spelled it is listed; listed both ways it is writable, and a note says so."""
    made = Image().rules(("/usr/", "//usr", "/data"), ("/data/.", "/data"))
    assert made.read_only.count("/usr") == 1
    assert "/data" not in made.read_only
    assert made.read_write.count("/data") == 1
    assert [note for note in made.notes if "/data" in note] == [
        "/data is listed read-only and read-write: it is writable"
    ]


@pytest.mark.parametrize("listed", ["/", "/.", "//"])
def test_the_root_directory_is_never_writable(listed: str) -> None:
    """Neither by the policy, however it is spelled, nor as the working directory, chosen or not; each time a note says so."""
    for made in (
        Image().rules((), (listed,)),
        Image().rules(include_workdir=True, workdir=listed),
        Image().rules(include_workdir=True, standing_in=listed),
        Image(()).rules(include_workdir=True, standing_in=listed),
    ):
        assert "/" not in made.read_write
        assert len(made.notes) == 1
        assert "/" in made.notes[0]


@pytest.mark.parametrize("listed", ["/tmp", "/dev/null", "/tmp/keys", "/tmp/a/b"])
def test_the_baseline_makes_nothing_writable_that_is_listed_read_only(listed: str) -> None:
    """A writable path of the baseline that is, or holds, an explicit read-only path is left out, and a note names both."""
    place = "/tmp" if listed.startswith("/tmp") else listed
    made = Image().rules((listed,))
    assert listed in made.read_only
    assert place not in made.read_write
    assert f"{place} is not made writable: the policy lists {listed} read-only" in made.notes
    assert place in Image().rules(("/tmporary",)).read_write


def test_a_link_does_not_make_it_writable_either() -> None:
    """The comparison is by what the paths lead to: a read-only link into /tmp keeps /tmp from being added."""
    image = Image((*DEBIAN, "/data"), {"/data": "/tmp/data"})
    assert "/tmp" not in image.rules(("/data",)).read_write
    image = Image((*DEBIAN, "/data"), {"/data": "/srv/data"})
    assert "/tmp" in image.rules(("/data",)).read_write
    assert "/srv/data" not in image.rules(("/data",), include_workdir=None, standing_in="/srv/data").read_write


def test_the_operators_own_contradiction_is_said() -> None:
    """A read-only path in a writable one of the policy is writable, for Landlock has no exceptions; a note says so."""
    made = Image().rules(("/srv/data/keys", "/srv/other"), ("/srv/data",))
    assert made.notes == ("/srv/data/keys is listed read-only but is writable, because it lies in /srv/data",)


# --- the working directory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [None, True])
@pytest.mark.parametrize("workdir", ["/srv/place", "/srv/place/", "/usr/src/app", "/etc", "/absent"])
def test_a_chosen_working_directory_is_writable(workdir: str, include: bool | None) -> None:
    """--workdir wins over a read-only path around it and over itself in the baseline; it stands in one list."""
    made = Image().rules(include_workdir=include, workdir=workdir)
    assert normal(workdir) in made.read_write
    assert normal(workdir) not in made.read_only
    assert normal(workdir) not in made.added


def test_a_chosen_working_directory_over_the_policy() -> None:
    """Where the policy lists it read-only, the operator's choice counts and a note says that it did."""
    made = Image().rules(("/srv/place",), include_workdir=True, workdir="/srv/place")
    assert "/srv/place" in made.read_write
    assert "/srv/place" not in made.read_only
    assert made.notes == ("/srv/place is listed read-only and is the working directory: it is writable",)


@pytest.mark.parametrize("workdir", [None, "/srv/place"])
def test_without_include_workdir_none_is_added(workdir: str | None) -> None:
    """`include_workdir: false` adds neither the chosen directory nor the present one, and says nothing."""
    made = Image().rules(include_workdir=False, workdir=workdir, standing_in="/srv/here")
    assert not {"/srv/place", "/srv/here"} & {*made.read_only, *made.read_write}
    assert made.notes == ()


def test_the_directory_one_stands_in_is_writable() -> None:
    """Without --workdir; also when the policy has no filesystem section at all; and only when --workdir is not given."""
    assert "/srv/here" in Image().rules(include_workdir=None, standing_in="/srv/here").read_write
    no_section = SandboxPolicy(landlock=LandlockPolicy())
    assert "/srv/here" in Image().rules(policy=no_section, standing_in="/srv/here").read_write
    assert "/srv/here" not in Image().rules(include_workdir=True, workdir="/w", standing_in="/srv/here").read_write


@pytest.mark.parametrize(
    ("standing_in", "against"),
    [
        ("/usr", "/usr"),
        ("/usr/src/x", "/usr"),
        ("/app", "/app"),
        ("/srv", "/srv/data"),
        ("/srv/data/x", "/srv/data"),
        ("/", "/"),
    ],
)
def test_the_directory_one_stands_in_never_overrules(standing_in: str, against: str) -> None:
    """Where it is the root directory, or is, holds or lies in a read-only path, it is not writable and a note names why."""
    made = Image((*DEBIAN, *DEVICES, "/app")).rules(("/srv/data",), include_workdir=True, standing_in=standing_in)
    assert standing_in not in made.read_write
    (note,) = made.notes
    assert note.startswith(f"the working directory {standing_in} is not writable")
    assert against in note
    assert "--workdir" in note


def test_a_neighbour_of_a_read_only_path_is_no_conflict() -> None:
    """/usr2 does not lie in /usr."""
    assert "/usr2" in Image().rules(include_workdir=True, standing_in="/usr2").read_write


@pytest.mark.parametrize("standing_in", ["/tmp", "/tmp/project"])
def test_a_directory_that_is_writable_already(standing_in: str) -> None:
    """Standing in a writable directory adds nothing and needs no note."""
    made = Image().rules(include_workdir=True, standing_in=standing_in)
    assert made == Image().rules(include_workdir=False)


# --- a GPU -----------------------------------------------------------------------------------------------------------------

NVIDIA = (
    "/dev/nvidiactl",
    "/dev/nvidia-uvm",
    "/dev/nvidia0",
    "/dev/nvidia12",
    "/dev/nvidia",
    "/dev/nvidia-caps",
    "/dev/nvidia0x",
    "/dev/nvidia٣",
    "/run/nvidia-persistenced",
)


def test_a_gpu_is_known_by_its_devices() -> None:
    """The cards by number and the control devices are writable, and so is /proc; look-alikes are not added."""
    made = Image((*DEBIAN, *NVIDIA)).rules()
    devices = {path for path in made.read_write if path.startswith("/dev/")}
    assert devices == {"/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0", "/dev/nvidia12"}
    assert "/run/nvidia-persistenced" in made.read_only
    assert "/proc" in made.read_write
    assert "/proc" not in made.read_only


def test_wsl_has_another_device() -> None:
    """/dev/dxg alone is a GPU too, with its libraries."""
    made = Image((*DEBIAN, "/dev/dxg", "/usr/lib/wsl")).rules()
    assert {"/dev/dxg", "/proc"} <= set(made.read_write)
    assert "/usr/lib/wsl" in made.read_only


def test_without_a_gpu_nothing_of_it() -> None:
    """A card's number alone is not a GPU, and /proc stays read-only."""
    made = Image((*DEBIAN, "/dev/nvidia0", "/usr/lib/wsl")).rules()
    assert "/dev/nvidia0" not in made.read_write
    assert "/usr/lib/wsl" not in made.read_only
    assert "/proc" in made.read_only


def test_only_proc_is_promoted() -> None:
    """With a GPU an explicit read-only /proc becomes writable, with a note; an explicit read-only card does not."""
    made = Image((*DEBIAN, *NVIDIA)).rules(("/proc", "/dev/nvidia0"))
    assert "/proc" in made.read_write
    assert "/proc" not in made.read_only
    assert "/dev/nvidia0" in made.read_only
    assert "/dev/nvidia0" not in made.read_write
    assert "/proc is listed read-only and made writable: a GPU needs it" in made.notes


# --- whatever the policy ---------------------------------------------------------------------------------------------------

BASELINE = {*baseline.READ_ONLY, *baseline.READ_WRITE}
GPU = {*baseline.GPU_READ_ONLY, *baseline.GPU_READ_WRITE, "/dev/nvidia0"}
WORDS = st.sampled_from(["usr", "tmp", "dev", "null", "proc", "etc", "srv", "a", "b", "data", ".", ""])
PATHS = st.one_of(
    st.lists(WORDS, max_size=4).map(lambda parts: "/" + "/".join(parts)),
    st.sampled_from(sorted(BASELINE | GPU)),
)
IMAGES = st.builds(
    Image,
    st.lists(PATHS, max_size=12).map(lambda paths: (*DEBIAN, *paths)),
    st.dictionaries(
        st.sampled_from(["/srv/a", "/data", "/b"]), st.sampled_from(["/tmp/data", "/usr/x", "/dev", "/srv"])
    ),
)
LISTS = st.lists(PATHS, max_size=6)


@given(
    IMAGES,
    LISTS,
    LISTS,
    st.sampled_from([None, True, False]),
    st.none() | PATHS,
    PATHS,
    st.lists(PATHS, max_size=2).map(tuple),
)
def test_nothing_is_granted_that_nobody_named(
    image: Image,
    read_only: list[str],
    read_write: list[str],
    include: bool | None,
    workdir: str | None,
    standing_in: str,
    run: tuple[str, ...],
) -> None:
    """Each path comes from the policy, the baseline, a GPU, the run's directories or the working directory; read-only ones stay.

    Writable is only what the policy, the operator or the baseline made so; an explicit read-only path is within reach of a
    writable one only where the policy, --workdir or the GPU's /proc says so, and then a note names it.
    """
    made = image.rules(
        read_only, read_write, include_workdir=include, workdir=workdir, standing_in=standing_in, run=run
    )
    both = [*made.read_only, *made.read_write]
    assert len(set(both)) == len(both)
    assert all(normal(path) == path for path in both)
    assert "/" not in made.read_write

    listed, writable = {normal(path) for path in read_only}, {normal(path) for path in read_write}
    place = set() if include is False else {normal(workdir or standing_in)}
    gpu = GPU if any(image.exists(mark) for mark in baseline.GPU_MARKS) else set()
    assert set(both) <= listed | writable | BASELINE | gpu | {normal(path) for path in run} | place
    assert listed | writable - {"/"} <= set(both)
    assert set(made.added) <= set(both) - (writable - {"/"})
    assert set(made.read_write) <= writable | place | {*baseline.READ_WRITE} | (
        gpu and {*baseline.GPU_READ_WRITE, *GPU, "/proc"}
    )

    allowed = writable | ({normal(workdir)} if workdir and include is not False else set()) | (gpu and {"/proc"})
    for path in set(made.read_write) - allowed:
        inside = [one for one in listed - writable if beneath(image.real(one), image.real(path))]
        # What is beneath may have been made writable on purpose, by a path that is allowed to.
        assert not inside, f"{path} makes {inside} writable"
    for one in listed & set(made.read_only):
        if any(beneath(image.real(one), image.real(path)) for path in made.read_write):
            assert any(note.startswith(f"{one} is listed read-only but is writable") for note in made.notes)


def test_the_real_file_system_is_asked_by_default(open_tmp: Callable) -> None:
    """Without stand-ins the machine is asked: what is added exists here, and a directory that is not there has no names."""
    made = baseline.file_rules(default_policy(), workdir=None, standing_in=str(open_tmp))
    assert "/usr" in made.read_only
    assert "/dev/null" in made.read_write
    assert list(baseline.listing("/absent")) == []
