"""Every real client of the table works inside the sandbox without a flag, and shows its user why it was refused."""

from __future__ import annotations

import pathlib
import re

import pytest
import sandboxed
import table

MOST = 1500  # characters of a client's output that a failure shows: tracebacks end with what matters
ROWS = [
    pytest.param(client, mode, id=f"{client.name}, {mode}")
    for client in table.CLIENTS
    if sandboxed.for_this_version(client.needs)
    for mode in client.modes
]


@pytest.mark.parametrize(("client", "mode"), ROWS)
def test_client(client: table.Client, mode: str, site: sandboxed.Site, home: pathlib.Path) -> None:
    """The allowed lines are answered by the real upstream, the others are refused in words the client shows, and no refused
    request reached the upstream."""
    lacking = sandboxed.missing(client.needs)
    if lacking:
        pytest.skip(lacking)
    before = len(site.upstream.seen)
    outcomes, ran = sandboxed.live(client, mode, site, home)
    assert ran.layer("network")["state"] == "enforced"
    wrong = [_complaint(outcome) for outcome in outcomes]
    assert not any(wrong), "\n\n".join(filter(None, wrong)) + "\n\n" + ran.err[-2 * MOST :]
    reached = [line for line in site.upstream.seen[before:] if " /private" in line or line.startswith("DELETE")]
    assert not reached
    if mode == table.INSPECTED:
        assert all(
            "Denied" in str(event.get("action")) for event in ran.events if event.get("disposition") == "Blocked"
        )


def _complaint(outcome: sandboxed.Outcome) -> str:
    """What is wrong with one line's outcome, or an empty string."""
    good = (outcome.code == 0) == (outcome.step.kind == "works")
    shown = re.search(outcome.step.shows, outcome.text, re.DOTALL)
    if good and shown:
        return ""
    heading = f"{outcome.step.kind}: {outcome.step.line}\nexit {outcome.code}, wanted {outcome.step.shows!r} in:"
    return f"{heading}\n{outcome.text[-MOST:]}"
