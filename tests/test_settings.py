"""Settings: precedence, refusals by name, contradictions; and that a refused start leaves nothing behind."""

from __future__ import annotations

import base64
import json
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openshell_supervisor import settings, still_to_come
from openshell_supervisor.enforcement import Layer
from openshell_supervisor.errors import SettingsError

POLICY = "version: 1\nnetwork_policies: {}\n"


@pytest.fixture
def policy(tmp_path: pathlib.Path) -> str:
    """A file that can be read."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return str(path)


def refused(arguments: list[str], environment: dict[str, str] | None = None) -> SettingsError:
    """The error of a refused command line."""
    with pytest.raises(SettingsError) as caught:
        settings.read(arguments, environment or {})
    return caught.value


def test_flag_beats_environment_beats_default(policy: str) -> None:
    """The order of precedence holds for a value of each kind."""
    both = {"OPENSHELL_NETWORK_MODE": "host", "OPENSHELL_LOG_LEVEL": "error"}
    assert settings.read(["--network-mode", "isolated", "--", "true"], both).network_mode == "isolated"
    assert settings.read(["--", "true"], both).network_mode == "host"
    assert settings.read(["--", "true"], {}).network_mode == "auto"
    assert settings.read(["--log-level", "debug", "true"], both).log_level == "debug"
    assert settings.read(["true"], both).log_level == "error"
    assert settings.read(["true"], {**both, "RUST_LOG": "openshell=trace,warn"}).log_level == "warn"


def test_everything_after_the_first_word_is_the_commands(policy: str) -> None:
    """Options of the workload are not ours, with and without `--`."""
    assert settings.read(["--policy", policy, "curl", "-v", "--timeout", "3"], {}).command == (
        "curl",
        "-v",
        "--timeout",
        "3",
    )
    assert settings.read(["--policy", policy, "--", "curl", "--", "-i"], {}).command == ("curl", "--", "-i")
    assert settings.read([], {}).command == ("/bin/bash", "-l")


@pytest.mark.parametrize("flag", [*still_to_come.STILL_TO_COME_FLAGS, *still_to_come.STILL_TO_COME_SWITCHES])
def test_flags_to_come_are_refused_by_name(flag: str) -> None:
    """A known option whose capability is missing is named in the refusal, with a way out."""
    value = [] if flag in still_to_come.STILL_TO_COME_SWITCHES else ["x"]
    error = refused([flag, *value, "--", "true"])
    assert (error.code, error.exit_code) == ("not_built", 2)
    assert flag in error.message
    assert error.hint


@pytest.mark.parametrize("name", still_to_come.STILL_TO_COME_VARIABLES)
def test_variables_to_come_are_refused_by_name(name: str) -> None:
    """A known variable whose capability is missing is named, and an empty one counts as absent."""
    assert name in refused(["--", "true"], {name: "x"}).message
    settings.read(["--", "true"], {name: ""})


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--network-mode", "islolated"], "unknown_value"),
        (["--egress", "on"], "unknown_value"),
        (["--require", "network,filesytem"], "unknown_value"),
        (["--resolve", "api.example.com"], "unknown_value"),
        (["--resolve", "api.example.com=localhost"], "unknown_value"),
        (["--timeout", "soon"], "unknown_value"),
        (["--timeout", "-1"], "unknown_value"),
        (["--timeout", "nan"], "unknown_value"),
        (["--log-level", "loud"], "unknown_value"),
        (["--policy", "/no/such/policy.yaml"], "unreadable_file"),
        (["--upstream-ca", "/etc/hostname"], "invalid_file"),
        (["--workdir", "/no/such/dir"], "unreadable_file"),
        (["--status-file", "/no/such/dir/status.json"], "unwritable_file"),
        (["--ocsf-file", "/tmp"], "unwritable_file"),
        (["--network-mode", "host", "--egress", "enforce"], "contradiction"),
        (["--network-mode", "host", "--require", "network"], "contradiction"),
        (["--egress", "observe", "--require", "network"], "contradiction"),
        (["--host-network", "--network-mode", "isolated"], "contradiction"),
        (["--status-file", "/tmp/oss-same", "--ocsf-file", "/tmp/oss-same"], "contradiction"),
        (["--mode", "network-init"], "not_built"),
        (["--mode", "nonsense"], "usage"),
        (["--openshell-endpoint", "https://gateway:1"], "not_built"),
        (["--no-such-flag"], "usage"),
        (["--net", "host"], "usage"),
    ],
)
def test_bad_input_is_refused_with_what_where_and_how(arguments: list[str], code: str) -> None:
    """Each refusal has a stable code, exit code 2 and a hint."""
    error = refused([*arguments, "--", "true"])
    assert (error.code, error.exit_code) == (code, 2)
    assert error.hint


def test_local_policy_wins_over_the_gateway(policy: str) -> None:
    """Upstream's rule: file mode wins; without a file the missing gateway client is named."""
    assert settings.read(["--policy", policy, "true"], {"OPENSHELL_ENDPOINT": "http://gw:1"}).policy is not None
    assert "OPENSHELL_ENDPOINT" in refused(["true"], {"OPENSHELL_ENDPOINT": "http://gw:1"}).message


def test_main_process_spec_in_both_spellings() -> None:
    """Contract 1.3: JSON, or the same as unpadded base64url; anything else is refused."""
    spec = json.dumps({"version": 1, "command": ["a", "b c"], "tty": True})
    encoded = "base64url:" + base64.urlsafe_b64encode(spec.encode()).decode().rstrip("=")
    for text in (spec, encoded):
        read = settings.read([], {"OPENSHELL_MAIN_PROCESS_SPEC": text})
        assert (read.command, read.tty) == (("a", "b c"), True)
    for bad in (
        "{",
        "[]",
        '{"version":2,"command":["a"]}',
        '{"version":1,"command":[]}',
        '{"version":1,"command":[""]}',
        "base64url:!",
    ):
        assert refused([], {"OPENSHELL_MAIN_PROCESS_SPEC": bad}).code == "main_process_spec"


def test_pins_accumulate_and_are_canonical() -> None:
    """`--resolve` may repeat; names are lower-cased, IPv6 may be bracketed."""
    read = settings.read(["--resolve", "API.test.=127.0.0.1", "--resolve", "api.test=[::1]", "true"], {})
    assert read.resolve == {"api.test": ("127.0.0.1", "::1")}


def test_trust_settings_have_no_variable() -> None:
    """An image can bake environment variables, so nothing that loosens trust is read from there."""
    read = settings.read(["true"], {"OPENSHELL_RESOLVE": "a.test=127.0.0.1", "OPENSHELL_UPSTREAM_CA": "/etc/hostname"})
    assert (read.resolve, read.upstream_ca) == ({}, None)


def test_layers_are_parsed() -> None:
    """`--require` takes a list."""
    assert settings.read(["--require", "network, privileges", "true"], {}).require == {Layer.NETWORK, Layer.PRIVILEGES}


@given(
    st.lists(st.text(max_size=12), max_size=6),
    st.dictionaries(
        st.sampled_from(["OPENSHELL_MAIN_PROCESS_SPEC", "RUST_LOG", "OPENSHELL_USER_ENVIRONMENT", "OPENSHELL_GRACE"]),
        st.text(max_size=20),
    ),
)
def test_any_input_is_settings_or_a_refusal(arguments: list[str], environment: dict[str, str]) -> None:
    """No input raises anything but SettingsError (or leaves, for --help and --version)."""
    try:
        settings.read(arguments, environment)
    except (SettingsError, SystemExit):
        pass


def test_refused_start_is_one_screen_and_exit_code_two(tmp_path: pathlib.Path) -> None:
    """The program prints what and how to mend it, no traceback, and makes no file."""
    argv = [
        sys.executable,
        "-m",
        "openshell_supervisor",
        "--network-mode",
        "x",
        "--status-file",
        str(tmp_path / "s"),
        "--",
        "touch",
        str(tmp_path / "t"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "unknown value 'x'" in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", still_to_come.RESERVED_WORDS)
def test_commands_to_come_are_refused_by_name(word: str) -> None:
    """A command of the interface that is not built yet says so."""
    done = subprocess.run(
        [sys.executable, "-m", "openshell_supervisor", word], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "not built yet" in done.stderr


def test_version_is_one_line() -> None:
    """`--version` prints the name and the version."""
    done = subprocess.run(
        [sys.executable, "-m", "openshell_supervisor", "--version"], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "openshell-supervisor")
