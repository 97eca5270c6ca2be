"""Which rung a mode takes and whether demands are met, from rehearsed statements; and the report's two forms."""

from __future__ import annotations

import json
import pathlib

import pytest

from openshell_supervisor import settings as settings_room
from openshell_supervisor.doctor import outcome
from openshell_supervisor.doctor.checks import Severity, failed, ok
from openshell_supervisor.doctor.outcome import Rung
from openshell_supervisor.doctor.report import Report
from openshell_supervisor.enforcement import Enforcement, Layer, State, Statement
from openshell_supervisor.settings import Settings


def statement(rung: str, **states: State) -> Statement:
    """A rehearsed statement: everything enforced but what is named."""
    isolated = rung in ("veth", "loopback")
    network = states.pop("network", State.ENFORCED if isolated else State.DEGRADED)
    detail = {"canaries": 7, "gaps": []}
    entries = [Enforcement(Layer.NETWORK, network, "rehearsed", detail=detail)]
    entries += [
        Enforcement(layer, states.get(layer.value, State.ENFORCED), "rehearsed")
        for layer in Layer
        if layer is not Layer.NETWORK
    ]
    return Statement.of(
        requested_mode="auto",
        effective_mode="isolated" if isolated else "host",
        rung=rung,
        egress="enforce" if isolated else "observe",
        policy_generation=1,
        layers=entries,
    )


def works(name: str, **states: State) -> Rung:
    """A rung that was built."""
    return Rung(name, "it holds", 0.1, statement(name, **states))


def broken(name: str, errno: str = "EPERM") -> Rung:
    """A rung that the host refuses."""
    return Rung(name, "no", 0.1, step="namespace", errno=errno)


def settings(*options: str, **environment: str) -> Settings:
    """Settings as `run` reads them."""
    return settings_room.read([*options, "--", "true"], environment)


ALL = (works("veth"), works("loopback"), works("observed"))
LOWER = (broken("veth"), works("loopback"), works("observed"))
LOWEST = (broken("veth"), broken("loopback", "ENOSPC"), works("observed"))


@pytest.mark.parametrize(
    ("rungs", "mode", "options", "taken", "network"),
    [
        (ALL, "auto", (), "veth", "enforced"),
        (LOWER, "auto", (), "loopback", "enforced"),
        (LOWEST, "auto", (), "observed", "degraded"),
        (ALL, "isolated", (), "veth", "enforced"),
        (LOWEST, "isolated", (), None, None),
        (LOWEST, "auto", ("--egress", "enforce"), None, None),
        (ALL, "host", (), "observed", "off"),
    ],
)
def test_the_first_rung_of_the_mode_that_works(
    rungs: tuple[Rung, ...], mode: str, options: tuple[str, ...], taken: str | None, network: str | None
) -> None:
    """As the supervisor climbs; with egress enforced on demand, observing is no way out."""
    choice = outcome.choose(settings(*options), rungs, mode)
    assert choice.rung == taken
    assert (choice.statement is None) == (taken is None)
    assert choice.as_json()["network"] == network
    assert bool(choice.refusal) == (taken is None)


def test_a_degraded_network_names_every_rung_that_failed() -> None:
    """The rehearsed rung knows nothing of those above it; the choice does, as a start would."""
    choice = outcome.choose(settings(), LOWEST, "auto")
    assert choice.statement is not None
    entry = choice.statement.layer(Layer.NETWORK)
    assert entry.errno == "ENOSPC"
    assert "veth: namespace: EPERM; loopback: namespace: ENOSPC" in entry.reason


def test_a_layer_that_may_not_fail_ends_the_climb() -> None:
    """A refusal is no reason to take the next rung: the start ends. It is the same on each."""
    refused = Rung("veth", "no filter", 0.1, step="layer", refusal="no filter")
    choice = outcome.choose(settings(), (refused, works("loopback"), works("observed")), "auto")
    assert (choice.rung, choice.refusal) == (None, "no filter")


def test_an_external_network_is_not_attempted() -> None:
    """What the operator gave away is taken from its own rung; it holds by declaration, and the proxy enforces."""
    external = works("external", network=State.DEGRADED)
    mine = settings("--declare-external", "network", "--require", "network")
    assert outcome.wanted(mine)[0] == "external"
    choice = outcome.choose(mine, (external, *ALL), "auto")
    assert choice.statement is not None
    assert (choice.rung, choice.statement.egress) == ("external", "enforce")
    assert choice.statement.layer(Layer.NETWORK).state is State.EXTERNAL
    assert outcome.demand(mine.require, choice).met


def test_best_effort_tolerates_where_a_start_would_end() -> None:
    """Tolerated is not enforced: a demand for the network is not met by it."""
    mine = settings("--network-mode", "isolated", OPENSHELL_BEST_EFFORT_FAILURES="")
    choice = outcome.choose(mine, LOWEST, "isolated")
    assert choice.statement is not None
    assert choice.rung == "observed"
    assert choice.statement.layer(Layer.NETWORK).state is State.TOLERATED
    assert not outcome.demand(frozenset((Layer.NETWORK,)), choice).met
    demanding = settings("--network-mode", "isolated", "--egress", "enforce", OPENSHELL_BEST_EFFORT_FAILURES="")
    assert outcome.choose(demanding, LOWEST, "isolated").statement is None
    strict = settings("--network-mode", "isolated")
    assert outcome.choose(strict, LOWEST, "isolated").statement is None


def test_demands() -> None:
    """Met, not met with the reason, and never met where nothing would start."""
    choice = outcome.choose(settings(), (works("veth", filesystem=State.OFF),), "auto")
    assert outcome.demand(frozenset((Layer.NETWORK, Layer.SYSCALLS)), choice).met
    unmet = outcome.demand(frozenset((Layer.NETWORK, Layer.FILESYSTEM)), choice)
    assert unmet.unmet == ((Layer.FILESYSTEM, "off", "rehearsed"),)
    assert "filesystem off (rehearsed)" in unmet.sentence()
    nowhere = outcome.choose(settings(), LOWEST, "isolated")
    assert not outcome.demand(frozenset((Layer.PRIVILEGES,)), nowhere).met
    assert outcome.demand(frozenset(), nowhere).met


def report(hint: str = "mend it", summary: str = "broken") -> Report:
    """A small report."""
    choice = outcome.choose(settings(), LOWER, "auto")
    checks = (ok("a.fine", "works"), failed("a.longer_name", Severity.HIGH, summary, hint, errno="EPERM"))
    return Report(checks, LOWER, choice, choice, outcome.demand(frozenset(), choice), 0.25)


def test_columns_are_aligned_and_wrapped_at_the_terminals_width() -> None:
    """Every line of one column begins in the same place, hints too; no line is longer than the terminal is wide."""
    table = report(hint="word " * 40).table(width=80)
    lines = table.splitlines()
    start = lines[0].index("FOUND")
    hints = [line for line in lines if "word" in line]
    assert len(hints) > 2
    assert hints[0][start:].startswith("-> word")
    assert all(line[:start].strip() == "" for line in hints)
    assert max(map(len, lines)) <= 80


def test_what_a_host_says_does_not_steer_the_terminal() -> None:
    """Control characters of a host's files are shown as question marks; in JSON they are escaped."""
    told = report(summary="label \x1b]0;title\x07 of the host")
    assert "\x1b" not in told.table()
    assert "label ?]0;title? of the host" in told.table()
    assert "\x1b" not in told.as_json()


def test_colour_is_for_terminals() -> None:
    """With colour the same text, without the escapes, is what there is without."""
    coloured = report().table(colour=True)
    assert "\x1b[31mfailed" in coloured
    plain = coloured
    for code in ("\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[36m", "\x1b[0m"):
        plain = plain.replace(code, "")
    assert plain == report().table()


def test_the_json_is_one_object_with_these_keys() -> None:
    """The shape that docs/doctor.md promises."""
    body = json.loads(report().as_json())
    assert list(body) == [
        *("version", "supervisor", "seconds", "checks", "rungs", "layers", "auto", "mode", "require"),
    ]
    assert body["checks"][1] == {
        "id": "a.longer_name",
        "state": "failed",
        "severity": "high",
        "summary": "broken",
        "hint": "mend it",
        "facts": {"errno": "EPERM"},
    }
    assert body["auto"]["rung"] == "loopback"
    assert body["auto"]["passed_over"][0]["errno"] == "EPERM"


def test_every_check_of_the_code_is_documented(repo_root: pathlib.Path) -> None:
    """docs/doctor.md has a line for each id."""
    import asking

    text = (repo_root / "docs" / "doctor.md").read_text()
    assert [name for name in (*asking.CHECK_IDS, *asking.SOMETIMES) if f"`{name}`" not in text] == []
