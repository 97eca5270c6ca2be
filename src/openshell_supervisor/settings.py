"""One frozen `Settings`: flag over environment over file over default, read and cross-checked once.

Every option of the supervisor that this one replaces is accepted with the same meaning, or refused by name while its capability
is still to come (`STILL_TO_COME`); none is ignored in silence. What loosens (`--resolve`, `--upstream-ca`, `--egress`) is a flag
only, because an image can bake environment variables. Contradictions are `SettingsError`s: nothing has been started yet.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from openshell_supervisor import __version__, main_process, named
from openshell_supervisor.enforcement import Layer
from openshell_supervisor.errors import SettingsError
from openshell_supervisor.policy.model import Netlink
from openshell_supervisor.still_to_come import (
    IGNORED_FLAGS,
    STILL_TO_COME_FLAGS,
    STILL_TO_COME_SWITCHES,
    STILL_TO_COME_VARIABLES,
)

# Layers that an outer sandbox may own. Not the privileges: giving up what is not there costs nothing and never fails. Not the
# binary identity: nobody outside can tell the workload's programs apart for us.
DECLARABLE = frozenset((Layer.NETWORK, Layer.FILESYSTEM, Layer.SYSCALLS, Layer.SUPERVISOR_SYSCALLS))
NETWORK_MODES = ("isolated", "host", "auto")
EGRESS_MODES = ("enforce", "observe")
LOG_LEVELS = ("error", "warn", "info", "debug", "trace")
# `podman stop` and `docker stop` send SIGKILL after 10 s; the drain and the report need the rest.
DEFAULT_GRACE_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the operator decided. Paths are as given; durations in seconds (0 = no timeout)."""

    command: tuple[str, ...]
    tty: bool
    policy: Path | None
    network_mode: str = "auto"
    egress: str | None = None
    require: frozenset[Layer] = frozenset()
    status_file: Path | None = None
    ocsf_file: Path | None = None
    upstream_ca: Path | None = None
    resolve: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    run_dir: Path | None = None
    tls_dir: Path | None = None
    workdir: Path | None = None
    timeout: float = 0.0
    grace: float = DEFAULT_GRACE_SECONDS
    log_level: str = "info"
    sandbox_id: str = ""
    sandbox_name: str = ""
    image: str = ""
    oci_user: str | None = None
    sandbox_uid: str = ""
    sandbox_gid: str = ""
    user_variables: Mapping[str, str] = field(default_factory=dict)
    require_pid_limit: bool = False
    relaxed_identity: bool = False
    best_effort: bool = False
    external: frozenset[Layer] = frozenset()
    external_unsure: frozenset[Layer] = frozenset()
    netlink: Netlink | None = None
    policy_rules: Path | None = None
    opa_url: str = ""
    opa_token_file: Path | None = None
    opa_ca: Path | None = None
    self_probe: bool = True
    without_effect: tuple[str, ...] = ()


class _Parser(argparse.ArgumentParser):
    """argparse that raises our error instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, code="usage", hint="openshell-supervisor run --help")


def parser() -> argparse.ArgumentParser:
    """The command line of `run`; every option of contract 1.2 and ours."""
    top = _Parser(
        prog="openshell-supervisor run",
        description="Run a command behind the strongest network boundary that this host allows.",
        epilog="Everything after the first word that is not an option belongs to the command; put -- before it.",
        allow_abbrev=False,
    )
    top.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND [ARG ...]", help="the workload, default a login shell"
    )
    _add_policy_options(top)
    _add_workload_options(top)
    for flag in STILL_TO_COME_FLAGS:
        top.add_argument(flag, help=argparse.SUPPRESS)
    for flag in STILL_TO_COME_SWITCHES:
        top.add_argument(flag, action="store_true", default=None, help=argparse.SUPPRESS)
    return top


def _add_policy_options(top: argparse.ArgumentParser) -> None:
    top.add_argument("--policy", metavar="FILE", help="policy in YAML (OPENSHELL_POLICY)")
    top.add_argument("--policy-rules", metavar="FILE", help="decide by this Rego module (OPENSHELL_POLICY_RULES)")
    top.add_argument(
        "--policy-data", metavar="FILE", help="the policy that it decides by, in YAML (OPENSHELL_POLICY_DATA)"
    )
    top.add_argument(
        "--opa-url",
        metavar="URL",
        help="decide in this OPA server: http(s)://HOST:PORT or unix:/PATH (OPENSHELL_OPA_URL)",
    )
    top.add_argument("--opa-token-file", metavar="FILE", help="its bearer token (OPENSHELL_OPA_TOKEN_FILE)")
    top.add_argument(
        "--opa-ca", metavar="FILE", help="PEM roots trusted for it, instead of the system's (OPENSHELL_OPA_CA)"
    )
    top.add_argument(
        "--network-mode", metavar="MODE", help="isolated, host or auto (OPENSHELL_NETWORK_MODE; default auto)"
    )
    top.add_argument("--host-network", action="store_true", help="the same as --network-mode host")
    top.add_argument("--egress", metavar="MODE", help="enforce or observe")
    top.add_argument(
        "--require", metavar="LAYERS", help=f"refuse to start unless these hold: {', '.join(Layer)} (OPENSHELL_REQUIRE)"
    )
    top.add_argument(
        "--declare-external",
        metavar="LAYERS",
        help="layers that an outer sandbox owns: not attempted here (OPENSHELL_DECLARE_EXTERNAL)",
    )
    top.add_argument("--no-self-probe", action="store_true", help="do not try from inside what the layers must refuse")
    top.add_argument(
        "--status-file", metavar="PATH", help="write the enforcement statement here (OPENSHELL_STATUS_FILE)"
    )
    top.add_argument("--ocsf-file", metavar="PATH", help="append events as JSON lines (OPENSHELL_OCSF_FILE)")
    top.add_argument(
        "--resolve", metavar="HOST=ADDRESS", action="append", default=[], help="pin a name to an address, loopback too"
    )
    top.add_argument("--upstream-ca", metavar="FILE", help="PEM roots trusted upstream besides the system's")
    top.add_argument("--run-dir", metavar="DIR", help="the one writable directory (OPENSHELL_RUN_DIR)")
    top.add_argument(
        "--log-level", metavar="LEVEL", help="error, warn, info, debug or trace (OPENSHELL_LOG_LEVEL; default info)"
    )
    top.add_argument("--sandbox-id", metavar="ID", help="sandbox id in events (OPENSHELL_SANDBOX_ID)")
    top.add_argument("--sandbox", metavar="NAME", help="sandbox name in events (OPENSHELL_SANDBOX)")
    top.add_argument("--openshell-endpoint", metavar="URL", help=argparse.SUPPRESS)


def _add_workload_options(top: argparse.ArgumentParser) -> None:
    top.add_argument("--workdir", "-w", metavar="DIR", help="working directory of the workload")
    top.add_argument(
        "--timeout", "-t", metavar="SECONDS", default="0", help="end the workload after this time (exit code 124)"
    )
    top.add_argument("--grace", metavar="SECONDS", help="time between SIGTERM and SIGKILL (OPENSHELL_GRACE; default 8)")
    top.add_argument("--interactive", "-i", action="store_true", help="give the workload a terminal of its own")
    top.add_argument("--version", action="version", version=f"openshell-supervisor {__version__}")
    top.add_argument("--mode", help=argparse.SUPPRESS)
    for flag in IGNORED_FLAGS:
        if flag == "--health-check":
            top.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
        else:
            top.add_argument(flag, help=argparse.SUPPRESS)


def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from argv (without the program's name) and the environment. Raises `SettingsError`; `--help` and `--version`
    end the process as argparse does."""
    values = parser().parse_args(list(arguments))
    _refuse_empty(values)
    _refuse_what_is_to_come(values, environment)
    command, tty = main_process.command(values.command, bool(values.interactive), environment)
    said = _declared(values.declare_external, "--declare-external")
    variable = _declared(environment.get("OPENSHELL_DECLARE_EXTERNAL"), "OPENSHELL_DECLARE_EXTERNAL")
    policy = named.existing_file(values.policy or environment.get("OPENSHELL_POLICY"), "--policy")
    own_rules, data = _own_rules(values, environment)
    if own_rules is not None and policy is not None:
        raise _fail("contradiction", "--policy-rules excludes --policy", "the rules decide by --policy-data")
    policy = policy or data
    _check_gateway(values, environment, policy)
    settings = Settings(
        command=command,
        tty=tty,
        policy=policy,
        network_mode=_network_mode(values, environment),
        egress=_choice(values.egress, "--egress", EGRESS_MODES),
        # Both are demands: a flag adds to what the environment demands, and never takes it back.
        require=_layers(values.require, "--require")
        | _layers(environment.get("OPENSHELL_REQUIRE"), "OPENSHELL_REQUIRE"),
        status_file=named.output(values.status_file or environment.get("OPENSHELL_STATUS_FILE"), "--status-file"),
        ocsf_file=named.output(values.ocsf_file or environment.get("OPENSHELL_OCSF_FILE"), "--ocsf-file"),
        upstream_ca=named.pem(named.existing_file(values.upstream_ca, "--upstream-ca")),
        resolve=_pins(values.resolve),
        run_dir=named.path(values.run_dir or environment.get("OPENSHELL_RUN_DIR")),
        tls_dir=named.path(environment.get("OPENSHELL_PROXY_TLS_DIR")),
        workdir=named.directory(values.workdir, "--workdir"),
        timeout=_seconds(values.timeout, "--timeout"),
        grace=_seconds(values.grace or environment.get("OPENSHELL_GRACE") or str(DEFAULT_GRACE_SECONDS), "--grace"),
        log_level=_log_level(values.log_level, environment),
        sandbox_id=values.sandbox_id or environment.get("OPENSHELL_SANDBOX_ID", ""),
        sandbox_name=values.sandbox or environment.get("OPENSHELL_SANDBOX", ""),
        **_variables_alone(environment),
        external=said | variable,
        external_unsure=variable - said,
        policy_rules=own_rules,
        opa_url=values.opa_url or environment.get("OPENSHELL_OPA_URL", ""),
        opa_token_file=named.existing_file(
            values.opa_token_file or environment.get("OPENSHELL_OPA_TOKEN_FILE"), "--opa-token-file"
        ),
        opa_ca=named.existing_file(values.opa_ca or environment.get("OPENSHELL_OPA_CA"), "--opa-ca"),
        self_probe=not values.no_self_probe,
        without_effect=_without_effect(values, environment),
    )
    _cross_check(settings)
    for layer in _layers(values.require, "--require"):
        believe(settings, layer, f"--require {layer}")
    if settings.egress == "enforce":
        believe(settings, Layer.NETWORK, "--egress enforce")
    return settings


def _refuse_empty(values: argparse.Namespace) -> None:
    for name, value in vars(values).items():
        if isinstance(value, str) and not value.strip(" ,"):
            flag = f"--{name.replace('_', '-')}"
            hint = "leave the flag out, or check the variable it came from"
            raise _fail("empty_value", f"{flag} is given and empty", hint)


def _variables_alone(environment: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `Settings` that no flag sets: what drivers say, and upstream's switches."""
    identity = environment.get("OPENSHELL_NETWORK_BINARY_IDENTITY", "").lower()
    return {
        "image": environment.get("OPENSHELL_CONTAINER_IMAGE", ""),
        "oci_user": environment.get("OPENSHELL_OCI_IMAGE_USER"),
        "sandbox_uid": environment.get("OPENSHELL_SANDBOX_UID", ""),
        "sandbox_gid": environment.get("OPENSHELL_SANDBOX_GID", ""),
        "user_variables": _user_variables(environment.get("OPENSHELL_USER_ENVIRONMENT", "")),
        "require_pid_limit": "OPENSHELL_REQUIRE_RUNTIME_PID_LIMIT" in environment,
        "relaxed_identity": identity in ("relaxed", "disabled", "endpoint-only", "false", "0"),
        "best_effort": "OPENSHELL_BEST_EFFORT_FAILURES" in environment,  # presence, the empty string too (S2-01)
        "netlink": _netlink(environment.get("OPENSHELL_ALLOW_NETLINK_ENUMERATE", "")),
    }


def _own_rules(values: argparse.Namespace, environment: Mapping[str, str]) -> tuple[Path | None, Path | None]:
    """The module and the policy that it decides by: both or neither (contract 1.2)."""
    rules = named.existing_file(values.policy_rules or environment.get("OPENSHELL_POLICY_RULES"), "--policy-rules")
    data = named.existing_file(values.policy_data or environment.get("OPENSHELL_POLICY_DATA"), "--policy-data")
    if (rules is None) != (data is None):
        raise _fail(
            "contradiction", "--policy-rules and --policy-data are given together or not at all", "give both files"
        )
    return rules, data


def status_file_of(arguments: Sequence[str], environment: Mapping[str, str]) -> Path | None:
    """The status file that a command line means, even one that is refused for another reason."""
    before = list(arguments[: list(arguments).index("--")]) if "--" in arguments else list(arguments)
    for index, word in enumerate(before):
        if word.startswith("--status-file="):
            return named.path(word.partition("=")[2])
        if word == "--status-file" and index + 1 < len(before):
            return named.path(before[index + 1])
    return named.path(environment.get("OPENSHELL_STATUS_FILE"))


def _fail(code: str, message: str, hint: str = "") -> SettingsError:
    return SettingsError(message, code=code, hint=hint)


def _refuse_what_is_to_come(values: argparse.Namespace, environment: Mapping[str, str]) -> None:
    for flag, why in {**STILL_TO_COME_FLAGS, **STILL_TO_COME_SWITCHES}.items():
        if getattr(values, flag.removeprefix("--").replace("-", "_")) is not None:
            raise _fail("not_built", f"{flag}: {why}", "leave the flag out")
    for name, why in STILL_TO_COME_VARIABLES.items():
        if environment.get(name):
            raise _fail("not_built", f"{name}: {why}", "unset the variable")
    components = {item.strip() for item in (values.mode or "network,process").split(",") if item.strip()}
    if components != {"network", "process"}:
        known = components and components <= {"network", "process", "network-init"}
        why = (
            "only `network,process` together are built yet" if known else "known are network, process and network-init"
        )
        raise _fail("not_built" if known else "usage", f"--mode {values.mode}: {why}", "leave the flag out")


def _without_effect(values: argparse.Namespace, environment: Mapping[str, str]) -> tuple[str, ...]:
    """What was given and means nothing here, as upstream: to be said, not to be refused."""
    given = [flag for flag in IGNORED_FLAGS if getattr(values, flag.removeprefix("--").replace("-", "_"))]
    if not values.command and not environment.get("OPENSHELL_MAIN_PROCESS_SPEC"):
        given.append(
            f"no command: starting {' '.join(main_process.DEFAULT_COMMAND)}, as upstream does (--help lists the options)"
        )
    user = environment.get("OPENSHELL_USER_ENVIRONMENT")
    if user and not _user_variables(user):
        given.append("OPENSHELL_USER_ENVIRONMENT: no JSON map of text")
    if values.openshell_endpoint or environment.get("OPENSHELL_ENDPOINT"):
        given.append("OPENSHELL_ENDPOINT: the local policy wins, the gateway is not asked")
    return tuple(given)


def _check_gateway(values: argparse.Namespace, environment: Mapping[str, str], policy: Path | None) -> None:
    endpoint = values.openshell_endpoint or environment.get("OPENSHELL_ENDPOINT")
    if endpoint and policy is None:
        raise _fail(
            "not_built",
            "OPENSHELL_ENDPOINT: fetching the policy from a gateway is not built yet",
            "give a local policy with --policy FILE; it wins over the gateway",
        )


def _network_mode(values: argparse.Namespace, environment: Mapping[str, str]) -> str:
    if values.host_network:
        if values.network_mode not in (None, "host"):
            raise _fail(
                "contradiction", f"--host-network contradicts --network-mode {values.network_mode}", "give one of them"
            )
        return "host"
    if values.network_mode is not None:
        return _choice(values.network_mode, "--network-mode", NETWORK_MODES) or "auto"
    return _choice(environment.get("OPENSHELL_NETWORK_MODE"), "OPENSHELL_NETWORK_MODE", NETWORK_MODES) or "auto"


def _choice(value: str | None, name: str, known: Sequence[str]) -> str | None:
    if not value:
        return None
    if value not in known:
        hint = "platform mode is not built yet" if value.lower() == "platform" else f"known are {', '.join(known)}"
        raise _fail("unknown_value", f"{name}: unknown value {value!r}", hint)
    return value


def _layers(text: str | None, source: str) -> frozenset[Layer]:
    names = [item.strip() for item in (text or "").split(",") if item.strip()]
    unknown = [name for name in names if name not in set(Layer)]
    if unknown:
        raise _fail("unknown_value", f"{source}: unknown layer {unknown[0]!r}", f"known are {', '.join(Layer)}")
    return frozenset(Layer(name) for name in names)


def _declared(text: str | None, source: str) -> frozenset[Layer]:
    """What the operator says that an outer sandbox owns."""
    layers = _layers(text, source)
    refused = sorted(layers - DECLARABLE)
    if refused:
        raise _fail(
            "external_refused",
            f"{source}: {refused[0]} cannot be somebody else's job",
            f"declare only {', '.join(sorted(DECLARABLE))}",
        )
    return layers


def believe(settings: Settings, demanded: Layer, by: str) -> None:
    """Raise `SettingsError` where only a variable, which an image can bake, says that somebody else owns a layer that `by`
    demands: the demand of a flag, or of the policy."""
    if demanded in settings.external_unsure:
        raise _fail(
            "external_unsure",
            f"OPENSHELL_DECLARE_EXTERNAL says that {demanded} is owned outside, and {by} demands it",
            f"an image can bake that variable: say it yourself, with --declare-external {demanded}",
        )


def _netlink(text: str) -> Netlink | None:
    """S3-01: `1`, `true` and `yes` drop the rule, `route` allows NETLINK_ROUTE alone, anything else denies; None leaves the
    word to the policy."""
    if not text:
        return None
    return {"1": Netlink.ALLOWED, "true": Netlink.ALLOWED, "yes": Netlink.ALLOWED, "route": Netlink.ROUTE}.get(
        text.lower(), Netlink.DENIED
    )


def _pins(items: Sequence[str]) -> dict[str, tuple[str, ...]]:
    pins: dict[str, tuple[str, ...]] = {}
    for item in items:
        host, separator, address = item.partition("=")
        host = host.strip().lower().rstrip(".")
        if not separator or not re.fullmatch(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?", host):
            raise _fail(
                "unknown_value",
                f"--resolve: {item!r} is not HOST=ADDRESS",
                "for example --resolve api.example.com=127.0.0.1",
            )
        try:
            pins[host] = (*pins.get(host, ()), str(ipaddress.ip_address(address.strip().strip("[]"))))
        except ValueError:
            raise _fail(
                "unknown_value", f"--resolve: {address!r} is not an IP address", "names are not resolved here"
            ) from None
    return pins


def _seconds(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 10**9:
        raise _fail("unknown_value", f"{name}: {text!r} is not a number of seconds", "0 or more, for example 30")
    return value


def _log_level(flag: str | None, environment: Mapping[str, str]) -> str:
    rust = environment.get(
        "RUST_LOG", ""
    )  # upstream: a valid RUST_LOG overrides the level; only its default part counts here
    levels = [part for part in (item.strip().lower() for item in rust.split(",")) if part in LOG_LEVELS]
    if levels:
        return levels[-1]
    return (
        _choice((flag or environment.get("OPENSHELL_LOG_LEVEL") or "info").lower(), "--log-level", LOG_LEVELS) or "info"
    )


def _user_variables(text: str) -> dict[str, str]:
    """OPENSHELL_USER_ENVIRONMENT: a JSON map of text; anything else counts as empty (contract 1.5)."""
    try:
        value: Any = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}


def _cross_check(settings: Settings) -> None:
    if settings.network_mode == "host" and settings.egress == "enforce":
        raise _fail(
            "contradiction",
            "--egress enforce contradicts network mode host: without a boundary nothing can be enforced",
            "choose --network-mode isolated or auto, or leave --egress out",
        )
    if settings.network_mode != "auto" and Layer.NETWORK in settings.external:
        raise _fail(
            "contradiction",
            f"network mode {settings.network_mode} contradicts --declare-external network: no boundary is built here then",
            "leave the network mode out, or do not declare the network external",
        )
    if settings.network_mode == "host" and Layer.NETWORK in settings.require:
        raise _fail(
            "contradiction", "--require network contradicts network mode host", "choose --network-mode isolated or auto"
        )
    if settings.egress == "observe" and Layer.NETWORK in settings.require:
        raise _fail("contradiction", "--require network contradicts --egress observe", "leave one of them out")
    targets = [path for path in (settings.status_file, settings.ocsf_file) if path is not None]
    if len(targets) == 2 and targets[0].absolute() == targets[1].absolute():
        raise _fail("contradiction", "--status-file and --ocsf-file name the same file", "give each a file of its own")
