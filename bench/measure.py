"""Fair comparison on a noisy machine: every contender is measured once per round, in a rotating order.

Drift (a neighbour, a warm CPU) then hits all alike, and a ratio is the median of the ratios *within* rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

Sample = Mapping[str, float]
Samples = dict[str, list[Sample]]


class BenchError(Exception):
    """A measurement that is not valid: a contender did not start, answered wrongly, or did not answer in time."""


def interleave(names: Sequence[str], sample: Callable[[str], Sample], rounds: int) -> tuple[Samples, list[str]]:
    """Take `sample(name)` of every contender `rounds` times, A B C, B C A, …; returns the samples and what failed.

    A contender that raises `BenchError` is left out of the remaining rounds and its samples are dropped: half of a
    series would be compared with other rounds than its peers'.
    """
    names = list(names)
    samples: Samples = {name: [] for name in names}
    failures: list[str] = []
    for number in range(rounds):
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            if name not in samples:
                continue
            try:
                samples[name].append(sample(name))
            except BenchError as error:
                failures.append(f"{name}: {error}")
                del samples[name]
    return samples, failures


def median(samples: list[Sample], key: str) -> float:
    """The median of one key over the rounds."""
    return statistics.median(one[key] for one in samples)


def medians(samples: Samples, key: str) -> dict[str, float]:
    """Per contender the median of one key."""
    return {name: median(series, key) for name, series in samples.items() if series}


def spread(samples: Samples, key: str) -> dict[str, tuple[float, float]]:
    """Per contender the lowest and the highest sample of one key."""
    return {
        name: (min(one[key] for one in series), max(one[key] for one in series))
        for name, series in samples.items()
        if series
    }


def difference(samples: Samples, ours: str, theirs: str, key: str) -> float | None:
    """The median over rounds of ours - theirs, or None when one of them was not measured."""
    pairs = zip(samples.get(ours, []), samples.get(theirs, []), strict=False)
    differences = [mine[key] - other[key] for mine, other in pairs]
    return statistics.median(differences) if differences else None


def ratio(samples: Samples, ours: str, theirs: str, key: str) -> float | None:
    """The median over rounds of ours / theirs, or None when one of them was not measured."""
    pairs = zip(samples.get(ours, []), samples.get(theirs, []), strict=False)
    ratios = [mine[key] / other[key] for mine, other in pairs if other[key]]
    return statistics.median(ratios) if ratios else None
