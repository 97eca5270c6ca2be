"""`openshell-supervisor explain`: one question, a file of cases, or a recording, under a policy file.

Exit codes are those of grep and diff: 0 for yes (allowed; every case agrees; nothing would change), 1 for no, 2 where there is no
answer because the input is unusable.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import ipaddress
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from openshell_supervisor.errors import SettingsError
from openshell_supervisor.explain import wording
from openshell_supervisor.explain.question import CONNECT, TRANSPORTS, Answer, Question, ask
from openshell_supervisor.policy.not_built import BUILT_PROTOCOLS, not_built
from openshell_supervisor.policy.yaml_file import load
from openshell_supervisor.verdict.decide import Generation, build_generation

YES, NO = 0, 1
GENERATION = 1
MAX_ARGUMENT = 8192
"""Characters of one argument; the longest request target that is not refused has 4096 and a query."""
EPILOG = "exit code: 0 allowed (all cases agree, nothing would change), 1 not, 2 unusable input; see docs/explain.md"


class _Parser(argparse.ArgumentParser):
    """A parser whose faults are errors like any other of ours."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"explain: {message}", code="usage", hint="openshell-supervisor explain --help")


def explain(arguments: Sequence[str]) -> int:
    """Answer, print, and give the exit code. Raises `SupervisorError` for unusable input."""
    options = _options(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a policy may hold names that the terminal cannot show
    try:
        if options.cases:
            code = _cases(Path(options.cases))
        elif options.replay:
            code = _replay(options)
        else:
            code = _single(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # a reader that has seen enough (`| head`)
        with contextlib.suppress(OSError):  # or the interpreter complains when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO


def parser() -> argparse.ArgumentParser:
    """The options of `explain`."""
    made = _Parser(
        prog="openshell-supervisor explain",
        description="Would this leave the sandbox? Which rule decides, and which one would have allowed it?",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--policy", metavar="FILE", help="the policy (YAML)")
    add("--policy-rules", metavar="FILE", help="a Rego module that decides instead, as a run's --policy-rules")
    add("--policy-data", metavar="FILE", help="the policy that it decides by (YAML)")
    add("--host", metavar="NAME", help="where to: a name or an address")
    add("--port", metavar="N", help="the port, 1 to 65535")
    add("--method", metavar="M", help="the method of a request; without one the question is about the connection")
    add("--path", metavar="P", help="the path of the request as it is sent, with ?query")
    add("--header", metavar="NAME: VALUE", action="append", default=[], help="a header field, where rules read bodies")
    add("--body", metavar="TEXT", help="the body, where rules read bodies (json-rpc, mcp)")
    add(
        "--transport", choices=TRANSPORTS, default=CONNECT, help="in a tunnel (https), or as an absolute http:// target"
    )
    add("--binary", metavar="FILE", help="the calling program; without one the policy's binaries are not looked at")
    add("--ancestor", metavar="FILE", action="append", default=[], help="a parent of the program, the nearest first")
    add(
        "--address",
        metavar="IP",
        action="append",
        default=[],
        help="what the host resolves to; names are never looked up",
    )
    add("--cases", metavar="FILE", help="JSON lines: policies with questions and expected answers")
    add("--replay", metavar="FILE", help="JSON lines as --ocsf-file writes them: what would change under --policy?")
    add("--json", action="store_true", help="one JSON object instead of text")
    return made


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    made = parser()
    options = made.parse_args(list(arguments))
    single = [
        name for name in ("host", "port", "method", "path", "body", "binary") if getattr(options, name) is not None
    ]
    single += [name for name in ("ancestor", "address", "header") if getattr(options, name)]
    if (options.policy_rules is None) != (options.policy_data is None):
        made.error("--policy-rules and --policy-data are given together or not at all")
    if options.policy is not None and options.policy_rules is not None:
        made.error("--policy-rules excludes --policy: the rules decide by --policy-data")
    policy = options.policy or options.policy_data
    if options.cases and (options.replay or policy or single):
        made.error("--cases stands alone: its lines hold the policies and the questions")
    if options.replay and single:
        made.error(f"--replay takes its questions from the file, so --{single[0]} has no place beside it")
    if not options.cases and not policy:
        made.error("--policy FILE is missing")
    if not options.cases and not options.replay:
        _check_single(made, options)
    return options


def _check_single(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.host is None or options.port is None:
        made.error("--host and --port say where to; or give --cases or --replay")
    if not (options.port.isascii() and options.port.isdigit() and 0 < int(options.port[:6]) < 65536):
        made.error(f"--port {wording.shown(options.port)} is not a port, 1 to 65535")
    if (options.method is None) != (options.path is None):
        made.error("--method and --path belong together")
    if options.path is not None and not options.path.startswith("/"):
        made.error("--path begins with /; the host is said by --host")
    if options.method is None and (options.body is not None or options.header):
        made.error("--header and --body belong to a request: --method and --path are missing")
    if any(":" not in field for field in options.header):
        made.error("--header is NAME: VALUE")
    if options.ancestor and options.binary is None:
        made.error("--ancestor needs --binary")
    for name in ("host", "method", "path", "binary"):
        if len(getattr(options, name) or "") > MAX_ARGUMENT:
            made.error(f"--{name} is longer than {MAX_ARGUMENT} characters")
    for address in options.address:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            made.error(f"--address {wording.shown(address)} is not an IP address")


def _generations(options: argparse.Namespace, *binaries: bool) -> list[Generation]:
    """The generation for the policy that the options name, for each of `binaries`: do callers count? Raises `PolicyError`."""
    if options.policy_rules is None:
        policy = load(Path(options.policy)).policy
        return [build_generation(policy, GENERATION, counted) for counted in binaries]
    from openshell_supervisor.verdict.own_rules import load_rules, own_engine

    policy = load(Path(options.policy_data), files=True).policy
    module = load_rules(Path(options.policy_rules), policy, options.policy_data, embedded=True)
    engines = [own_engine(module, policy, counted) for counted in binaries]
    return [
        build_generation(policy, GENERATION, counted, engine, own_rules=True)
        for counted, engine in zip(binaries, engines, strict=True)
    ]


def _single(options: argparse.Namespace) -> int:
    (generation,) = _generations(options, options.binary is not None)
    addresses = tuple(options.address) or None
    with contextlib.suppress(ValueError):  # an address is what it resolves to
        addresses = (str(ipaddress.ip_address(options.host.strip("[]"))),)
    fields = (field.partition(":") for field in options.header)
    question = Question(
        host=options.host,
        port=int(options.port),
        method=options.method or "",
        target=options.path or "",
        transport=options.transport,
        binary=options.binary or "",
        ancestors=tuple(options.ancestor),
        addresses=addresses,
        headers=tuple((name.strip().lower(), value.strip()) for name, _, value in fields),
        body=os.fsencode(options.body or ""),
    )
    answer = ask(question, generation)
    told = wording.Told.of(question, answer, generation, _notes(options, answer, generation))
    _write([told.as_json() if options.json else told.text()])
    return YES if answer.allow else NO


def _notes(options: argparse.Namespace, answer: Answer, generation: Generation) -> tuple[str, ...]:
    """What the answer leaves out, so that nobody takes it for more than it is."""
    notes = []
    listed = any(rule.binaries for rule in generation.policy.network_policies.values())
    unbuilt = {problem.code for problem in not_built(generation.policy)}
    if options.binary is not None and "not_built.binaries" in unbuilt:
        notes.append("the supervisor does not enforce binaries yet: any program gets what some program gets here")
    if options.binary is None and listed:
        notes.append("the policy's binaries were not looked at; --binary names the calling program")
    if answer.reason_id == "binary_not_allowed":
        notes.append("a listed path that is a link stands for its target, too, in the sandbox; here none is followed")
    if answer.protocol not in BUILT_PROTOCOLS:
        notes.append(f"the proxy does not read {answer.protocol} yet: it denies every request to this endpoint")
    return tuple(notes)


def _cases(path: Path) -> int:
    from openshell_supervisor.explain import cases

    agree = True
    for decided in cases.decide_all(cases.read(path)):
        _write([decided.line()])
        wrong = decided.disagreements()
        if wrong:
            agree = False
            sys.stdout.flush()
            sys.stderr.write(f"{wording.shown(decided.case.id)}: {wording.printable('; '.join(wrong))}\n")
    return YES if agree else NO


def _replay(options: argparse.Namespace) -> int:
    from openshell_supervisor.explain import replay

    outcome = replay.replay(Path(options.replay), *_generations(options, False, True))
    if options.json:
        _write([json.dumps(wording.replay_as_json(outcome), ensure_ascii=True)])
    else:
        _write(wording.replay_lines(outcome))
    return NO if outcome.changes else YES


def _write(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
