"""Where events go: what reaches the console at which level, and files and pipes that misbehave."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pathlib
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from openshell_supervisor.errors import SettingsError
from openshell_supervisor.telemetry import line_writer
from openshell_supervisor.telemetry.events import Context, Endpoint, Severity, Telemetry
from openshell_supervisor.telemetry.levels import Level, parse_level
from openshell_supervisor.telemetry.line_writer import LineWriter
from openshell_supervisor.telemetry.sinks import ConsoleSink, JsonlSink, MemorySink, encode
from telemetry.schema import assert_all_valid

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")


class Pipe:
    """A pipe with a writer on it; `read` takes what has arrived."""

    def __init__(self) -> None:
        self.reader, self.descriptor = os.pipe()
        self.writer = LineWriter(self.descriptor)

    def read(self, enough: Callable[[bytes], bool] = lambda data: True) -> str:
        data = b""
        deadline = time.monotonic() + 5
        os.set_blocking(self.reader, False)
        while time.monotonic() < deadline:
            try:
                data += os.read(self.reader, 1 << 16)
            except BlockingIOError:
                if enough(data):
                    break
                time.sleep(0.01)
        return data.decode()

    def capacity(self) -> int:
        return fcntl.fcntl(self.descriptor, fcntl.F_GETPIPE_SZ)

    def fill(self) -> int:
        """Fill the pipe to the last byte, as a workload that writes faster than anybody reads; returns how much."""
        os.set_blocking(self.descriptor, False)
        filled = 0
        for size in (4096, 1):
            try:
                while True:
                    filled += os.write(self.descriptor, b"." * size)
            except BlockingIOError:
                pass
        os.set_blocking(self.descriptor, True)
        return filled


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    for descriptor in (made.reader, made.descriptor):
        try:
            os.close(descriptor)
        except OSError:
            pass


def said(level: str, pipe: Pipe) -> list[str]:
    """The console lines of one event per severity, at `level`, without time."""
    telemetry = Telemetry(Context(), [ConsoleSink(level, pipe.writer)])
    for severity in Severity:
        telemetry.config("seen", severity.name, severity=severity)
    lines = pipe.read().splitlines()
    assert all(STAMP.match(line) for line in lines)
    return [STAMP.sub("", line) for line in lines]


@pytest.mark.parametrize("level", ["info", "debug", "trace", "INFO", "openshell=debug,info"])
def test_info_shows_every_event(level: str, pipe: Pipe) -> None:
    """At info and below, each event is one line: UTC time in milliseconds, OCSF, the one-line form."""
    assert said(level, pipe) == [
        "OCSF CONFIG:SEEN [INFO] INFORMATIONAL",
        "OCSF CONFIG:SEEN [LOW] LOW",
        "OCSF CONFIG:SEEN [MED] MEDIUM",
        "OCSF CONFIG:SEEN [HIGH] HIGH",
        "OCSF CONFIG:SEEN [CRIT] CRITICAL",
    ]


@pytest.mark.parametrize("level", ["warn", "error", "off", "openshell=debug,warn"])
def test_medium_and_above_are_shown_at_any_level(level: str, pipe: Pipe) -> None:
    """A denial or a lost control reaches standard error even where nothing else does."""
    assert [line.split()[2] for line in said(level, pipe)] == ["[MED]", "[HIGH]", "[CRIT]"]


def test_levels() -> None:
    """A RUST_LOG filter gives its default level, info if it has none; a word that is no level is refused with a hint."""
    assert parse_level("openshell=debug,warn") is Level.WARN
    assert parse_level("debug,warn") is Level.WARN
    assert parse_level("warn,openshell_sandbox::x=trace") is Level.WARN
    assert parse_level("openshell=debug") is parse_level("") is Level.INFO
    assert parse_level(" Warning ") is Level.WARN
    with pytest.raises(SettingsError, match="banana") as caught:
        parse_level("banana")
    assert "trace" in caught.value.hint


def test_the_time_of_a_line_is_now_in_utc(pipe: Pipe) -> None:
    """The stamp is the time of writing, also when the second changes between two lines."""
    sink = ConsoleSink("info", pipe.writer)
    for _ in range(3):
        before = time.time_ns() // 1_000_000
        sink.write({"severity_id": 1}, "x")
        after = time.time_ns() // 1_000_000
        stamp = pipe.read(lambda data: data.endswith(b"\n"))[:24]
        parsed = int(subprocess.check_output(["date", "-d", stamp, "+%s%3N"], text=True))
        assert before <= parsed <= after
        time.sleep(0.4)


def test_a_full_pipe_does_not_block_the_event_loop(pipe: Pipe) -> None:
    """With nobody reading standard error a write returns at once; the lines come out in order once there is a reader."""
    filled = pipe.fill()

    async def run() -> float:
        start = time.monotonic()
        for number in range(100):
            pipe.writer.write(f"line {number}")
        return time.monotonic() - start

    assert asyncio.run(run()) < 0.2
    lines = pipe.read(lambda data: data.endswith(b"line 99\n"))[filled:].splitlines()
    assert lines == [f"line {number}" for number in range(100)]
    assert pipe.writer.lost == 0


def test_a_reader_that_never_comes_costs_bounded_memory_and_is_told(pipe: Pipe) -> None:
    """Beyond the backlog lines are dropped and counted, and the reader that comes back is told how many."""
    filled = pipe.fill()
    line = "x" * 999
    count = 3 * line_writer.BACKLOG_BYTES // 1000
    for _ in range(count):
        pipe.writer.write(line)
    kept = line_writer.BACKLOG_BYTES // 1000
    assert pipe.writer.lost == count - kept
    lines = pipe.read(lambda data: b"were lost" in data and data.endswith(b"\n"))[filled:].splitlines()
    assert lines[:-1] == [line] * kept
    assert lines[-1].startswith(f"openshell: {count - kept} log lines were lost")


def test_a_workload_that_makes_stderr_non_blocking_loses_nothing(pipe: Pipe) -> None:
    """O_NONBLOCK belongs to the open file description, which the workload shares: our lines survive it, in order."""
    os.set_blocking(pipe.descriptor, False)
    count = 2 * pipe.capacity() // 1000
    for number in range(count):
        pipe.writer.write(f"{number:04d}" + "x" * 995)
    lines = pipe.read(lambda data: data.count(b"\n") == count).splitlines()
    assert [int(line[:4]) for line in lines] == list(range(count))


class Outrun(LineWriter):
    """A writer for which somebody always fills the pipe between the look at it and the write."""

    def _room(self, seconds: float) -> bool:
        super()._room(seconds)
        return True


def test_a_writer_that_is_outrun_keeps_its_lines(pipe: Pipe) -> None:
    """Where the pipe took one look's promise back, the line waits and is neither lost nor written twice."""
    filled = pipe.fill()
    os.set_blocking(pipe.descriptor, False)
    writer = Outrun(pipe.descriptor)
    writer.write("one")
    writer.write("two")
    assert pipe.read(lambda data: data.endswith(b"two\n"))[filled:] == "one\ntwo\n"
    assert writer.lost == 0


def test_a_line_longer_than_the_pipe_arrives_whole(pipe: Pipe) -> None:
    """A line that needs several writes is completed before the next one begins."""
    big = "y" * (2 * pipe.capacity())
    pipe.writer.write(big)
    pipe.writer.write("after")
    assert pipe.read(lambda data: data.endswith(b"after\n")) == f"{big}\nafter\n"


def test_a_closed_reader_is_not_fatal(pipe: Pipe) -> None:
    """A container runtime that went away costs the lines, not the supervisor."""
    os.close(pipe.reader)
    pipe.writer.write("x")
    pipe.writer.write("x")
    assert pipe.writer.lost == 2


def test_close_waits_for_a_slow_reader_but_not_for_ever(pipe: Pipe) -> None:
    """The last lines of a life come out when somebody reads within a second; nobody reading does not hang the exit."""
    pipe.fill()
    pipe.writer.write("the end")
    start = time.monotonic()
    pipe.writer.close()
    assert 0.5 < time.monotonic() - start < 5
    reader = threading.Timer(0.2, lambda: os.read(pipe.reader, 1 << 20))
    reader.start()
    pipe.writer.close()
    reader.join()
    assert pipe.read() == "the end\n"


def test_many_threads_write_whole_lines(pipe: Pipe) -> None:
    """Lines of several threads do not mix, and a thread's lines keep their order."""

    def write(name: str) -> None:
        for number in range(200):
            pipe.writer.write(f"{name} {number}")

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    lines = pipe.read(lambda data: data.count(b"\n") == 800).splitlines()
    for thread in threads:
        thread.join()
    for name in "abcd":
        assert [line for line in lines if line.startswith(name)] == [f"{name} {number}" for number in range(200)]


@pytest.fixture
def events(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "events.jsonl"


def tell(sink: JsonlSink, count: int = 1) -> None:
    telemetry = Telemetry(Context(sandbox_id="s"), [sink])
    for number in range(count):
        telemetry.network("Open", f"m {number}", action="Allowed", dst=Endpoint(host="é.example", port=443))


def test_a_file_of_valid_events(events: pathlib.Path) -> None:
    """One object per line, keys sorted at every level, no blanks, UTF-8 as is; readable by nobody else; appended to."""
    umask = os.umask(0)
    try:
        for _ in range(2):
            sink = JsonlSink(events)
            tell(sink, 3)
            sink.close()
    finally:
        os.umask(umask)
    assert assert_all_valid(events) == 6
    assert stat.S_IMODE(events.stat().st_mode) == 0o600
    for line in events.read_text(encoding="utf-8").splitlines():
        assert line == json.dumps(json.loads(line), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert "é.example" in line


def test_an_event_is_in_the_file_at_once(events: pathlib.Path) -> None:
    """A supervisor killed in the next instant has lost nothing: there is no buffer."""
    sink = JsonlSink(events)
    tell(sink)
    assert assert_all_valid(events) == 1
    sink.close()


def plant_link(path: pathlib.Path) -> None:
    (path.parent / "target").write_text("")
    path.symlink_to(path.parent / "target")


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (plant_link, "symbolic link"),
        (lambda path: path.symlink_to("/nonexistent/target"), "symbolic link"),
        (os.mkfifo, "not a regular file|cannot be opened"),
        (pathlib.Path.mkdir, "cannot be opened"),
        (lambda path: path.parent.rmdir(), "cannot be opened: No such file"),
    ],
    ids=["link", "dangling link", "fifo", "directory", "no directory"],
)
def test_what_is_not_a_regular_file_is_refused(
    plant: Callable[[pathlib.Path], None], what: str, tmp_path: pathlib.Path
) -> None:
    """A link, a FIFO, a directory: a SettingsError that names the file, at once, and nothing written anywhere."""
    path = tmp_path / "inner" / "events.jsonl"
    path.parent.mkdir()
    plant(path)
    with pytest.raises(SettingsError, match=what) as caught:
        JsonlSink(path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 2
    assert caught.value.hint
    if (path.parent / "target").exists():
        assert (path.parent / "target").read_text() == ""


def test_a_fifo_with_a_reader_and_a_device_are_refused(events: pathlib.Path) -> None:
    """What can be opened for writing and is still no file is refused after a look at the open descriptor."""
    os.mkfifo(events)
    reader = os.open(events, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for path in (events, pathlib.Path("/dev/null")):
            with pytest.raises(SettingsError, match="not a regular file"):
                JsonlSink(path)
    finally:
        os.close(reader)


FULL_DISK = """
import resource, signal, sys
from openshell_supervisor.telemetry.events import Context, Telemetry
from openshell_supervisor.telemetry.sinks import JsonlSink
sink = JsonlSink(sys.argv[1])
telemetry = Telemetry(Context(sandbox_id="s"), [sink])
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), limit[1]))
for number in range(10):
    telemetry.lifecycle("Start", f"m {number}")
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
telemetry.lifecycle("Stop", "room again")
telemetry.close()
print(sink.lost)
"""


def test_a_disk_that_is_full_costs_events_and_nothing_else(events: pathlib.Path) -> None:
    """Where the kernel refuses more bytes (in the middle of a line) the supervisor goes on: the loss is counted, said once
    and at the end, and the first event after there is room again stands on a line of its own."""
    size = 1500
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(events), str(size)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    lost = int(done.stdout)
    assert 0 < lost < 10
    assert done.stderr.count("OCSF events are being lost") == 1
    assert f"{lost} OCSF events could not be written" in done.stderr
    assert events.read_bytes()[size : size + 1] == b"\n"
    lines = events.read_text().splitlines()
    whole = [json.loads(line)["message"] for line in lines if line.endswith("}")]
    assert whole == [*(f"m {number}" for number in range(10 - lost)), "room again"]
    assert len(lines) == len(whole) + 1


@pytest.mark.root
def test_a_tmpfs_without_room(tmp_path: pathlib.Path) -> None:
    """The same with a real ENOSPC: a small tmpfs in a mount namespace of its own."""
    script = f"mount -t tmpfs -o size=8k none {tmp_path} && exec {sys.executable} -c '{UNTIL_FULL}' {tmp_path}/e"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr.count("No space left on device") == 1
    assert int(done.stdout) > 0


UNTIL_FULL = """
import sys
from openshell_supervisor.telemetry.events import Context, Telemetry
from openshell_supervisor.telemetry.sinks import JsonlSink
sink = JsonlSink(sys.argv[1])
telemetry = Telemetry(Context(), [sink])
for number in range(50):
    telemetry.lifecycle("Start", "m")
print(sink.lost)
"""


def test_a_torn_last_line_is_not_continued(events: pathlib.Path) -> None:
    """After a crash in the middle of a line the next supervisor begins on a new one."""
    events.write_text('{"torn":')
    sink = JsonlSink(events)
    tell(sink, 2)
    sink.close()
    lines = events.read_text().splitlines()
    assert lines[0] == '{"torn":'
    assert [json.loads(line)["class_uid"] for line in lines[1:]] == [4001, 4001]


def test_after_close_events_count_as_lost(events: pathlib.Path) -> None:
    """Writing to a closed sink is not an error and not a write to whatever got the descriptor's number since."""
    sink = JsonlSink(events)
    sink.close()
    sink.close()
    with open(events.with_name("other"), "w+b") as other:
        tell(sink)
        assert (sink.lost, other.read()) == (1, b"")


def test_the_descriptor_is_not_inherited(events: pathlib.Path) -> None:
    """The workload never gets the event file: it is closed on exec even where descriptors are not swept."""
    sink = JsonlSink(events)
    listed = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False, check=True)
    sink.close()
    assert events.name not in listed.stdout


def test_odd_values_are_still_written() -> None:
    """What JSON cannot say becomes text: a lone surrogate, bytes, an endless number, an object. Nothing raises."""
    for value in ("\udcff", b"x", 2**70, float("nan"), object(), {1: {2: (3,)}}):
        data = encode({"unmapped": {"value": value}})
        assert json.loads(data)["unmapped"].keys() == {"value"}


def test_json_has_no_raw_line_end_or_terminal_control() -> None:
    """What some readers take for the end of a line, or a terminal for a command, is escaped, and reads back the same."""
    text = "a\x7fb\x9bc\u2028d\u2029e\x85f\né\u20ac"
    data = encode({"message": text})
    assert len(data.decode().splitlines()) == 1
    assert not set(data.decode()) & set("\x7f\x9b\u2028\u2029\x85")
    assert json.loads(data) == {"message": text}
    assert "é€" in data.decode()


def test_memory_keeps_the_newest() -> None:
    """A bounded ring: the newest events stay, how many went is known."""
    sink = MemorySink(capacity=3)
    telemetry = Telemetry(Context(), [sink])
    for number in range(5):
        telemetry.config("seen", str(number))
    assert [event["message"] for event in sink.events] == ["2", "3", "4"]
    assert sink.lines[-1] == "CONFIG:SEEN [INFO] 4"
    assert sink.dropped == 2
    sink.clear()
    assert (sink.events, sink.dropped) == ([], 0)
