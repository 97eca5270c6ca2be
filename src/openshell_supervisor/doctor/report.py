"""The doctor's report for a person and for a program, made of the same values."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from openshell_supervisor import __version__
from openshell_supervisor.doctor.checks import Check, State
from openshell_supervisor.doctor.outcome import Choice, Demand, Rung

FORMAT = 1  # of the JSON; a key that changes its meaning makes it 2
COLOURS = {
    "ok": "32",
    "works": "32",
    "enforced": "32",
    "external": "36",
    "warning": "33",
    "degraded": "31",
    "tolerated": "33",
    "failed": "31",
}
NARROWEST = 40  # a column of text thinner than this is not worth wrapping


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the doctor found. `auto` is what the default mode would do, `mode` what the mode asked for would."""

    checks: tuple[Check, ...]
    rungs: tuple[Rung, ...]
    auto: Choice
    mode: Choice
    demand: Demand
    seconds: float

    def as_json(self) -> str:
        """One JSON object, indented, with a newline."""
        statement = self.mode.statement
        body = {
            "version": FORMAT,
            "supervisor": __version__,
            "seconds": round(self.seconds, 3),
            "checks": [check.as_json() for check in self.checks],
            "rungs": [rung.as_json() for rung in self.rungs],
            "layers": statement.as_json()["layers"] if statement else [],
            "auto": self.auto.as_json(),
            "mode": self.mode.as_json(),
            "require": self.demand.as_json(),
        }
        return json.dumps(body, indent=2) + "\n"

    def table(self, *, width: int | None = None, colour: bool = False) -> str:
        """For a person, with a newline; wrapped at `width` columns, not at all where it is None."""
        checks = [_with_hint(check) for check in self.checks]
        rungs = [("works" if rung.works else "failed", rung.name, _tagged(rung.why, rung.errno)) for rung in self.rungs]
        parts = [_columns(("STATE", "CHECK", "FOUND"), checks, width, colour=colour)]
        if rungs:
            parts.append(_columns(("STATE", "RUNG", "WHY"), rungs, width, colour=colour))
        statement = self.mode.statement
        if statement is not None:
            layers = [
                (item.state.value, item.layer.value, _tagged(item.reason, item.errno)) for item in statement.layers
            ]
            parts.append(_columns(("STATE", "LAYER", "WHY"), layers, width, colour=colour))
        sentences = [self.auto.sentence()]
        if self.mode.mode != self.auto.mode:
            sentences.append(self.mode.sentence())
        sentences.append(self.demand.sentence())
        counted = [f"{sum(check.state is state for check in self.checks)} {state}" for state in State]
        sentences.append(f"checks: {', '.join(counted)}; {self.seconds:.2f} s")
        parts.append("\n".join(piece for line in sentences for piece in _wrapped(_printable(line), width)))
        return "\n\n".join(parts) + "\n"


def _with_hint(check: Check) -> tuple[str, str, str]:
    return check.state.value, check.id, f"{check.summary}\n-> {check.hint}" if check.hint else check.summary


def _tagged(text: str, errno: str | None) -> str:
    return f"{text} [{errno}]" if errno and errno not in text else text


def _columns(
    head: tuple[str, str, str], rows: Sequence[tuple[str, str, str]], width: int | None, *, colour: bool
) -> str:
    """Three aligned columns; the third may have several lines, and is wrapped where there is a width."""
    first, second = (max(len(row[column]) for row in [head, *rows]) for column in (0, 1))
    room = width - first - second - 4 if width else None
    lines = []
    for state, name, text in [head, *rows]:
        pieces = [piece for line in text.split("\n") for piece in _wrapped(_printable(line), room)]
        painted = f"{state:<{first}}"
        if colour and state in COLOURS:
            painted = f"\x1b[{COLOURS[state]}m{painted}\x1b[0m"
        lines.append(f"{painted}  {name:<{second}}  {pieces[0]}".rstrip())
        lines += [f"{'':<{first}}  {'':<{second}}  {piece}" for piece in pieces[1:]]
    return "\n".join(lines)


def _wrapped(text: str, room: int | None) -> Iterable[str]:
    if room is None or room < NARROWEST or len(text) <= room:
        return [text]
    return textwrap.wrap(text, room, subsequent_indent="   " if text.startswith("-> ") else "")


def _printable(text: str) -> str:
    """Without control characters: what files of the host say must not steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
