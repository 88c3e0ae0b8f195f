"""Finished runs that differ in the seed alone, as one row with mean and standard deviation over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from wsn_fast.train.paper_numbers import beside_paper

AVERAGED = ("acc", "bwt", "fwt", "capacity_paper", "capacity")
"""The entries of results.json that a row has."""
# The settings in which runs of a row may differ. All but the seed change nothing but rounding.
_IGNORED = ("seed", "device", "threads", "checkpoint_seconds")
_NAMED = ("stream", "data", "tasks", "preset", "density")  # the settings that every table shows
_FINGERPRINT = "data fingerprint"


class Spread(NamedTuple):
    """The mean over seeds, and the sample standard deviation (n - 1), which is None for one seed."""

    mean: float
    deviation: float | None

    def text(self, between: str = " +- ") -> str:
        """Both with two digits, or the mean alone."""
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f"{between}{self.deviation:.2f}")


@dataclass(frozen=True)
class Row:
    """Runs that differ in the seed alone.

    Attributes:
        settings: those of the first run.
        setting: stream, data, number of tasks and preset, and what else tells this row from the others.
        runs: the names of the runs.
        seeds: the number of different seeds.
        numbers: for each name of ``AVERAGED`` its mean and deviation over seeds, in percent. Runs of the same seed
            count once, with their mean.
        paper: the paper's numbers for the setting (see :func:`wsn_fast.train.paper_numbers.beside_paper`).
    """

    settings: Mapping[str, Any]
    setting: str
    runs: Sequence[str]
    seeds: int
    numbers: Mapping[str, Spread]
    paper: tuple[float, float, str] | None

    @property
    def count(self) -> str:
        """The number of seeds, and that of runs where it is another."""
        return f"{self.seeds}" if self.seeds == len(self.runs) else f"{self.seeds} ({len(self.runs)} runs)"


def over_seeds(runs: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The rows of all finished runs, in the order of their first runs. Runs on different data are different rows.

    Args:
        runs: the results of runs by name.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    keys: dict[str, dict[str, Any]] = {}
    for name, results in runs.items():
        if len(results["accuracy_matrix"]) == results["config"]["tasks"]:
            keys[name] = _key(results)
            groups.setdefault(tuple(sorted(keys[name].items())), []).append(name)
    first = [keys[names[0]] for names in groups.values()]
    return [_row({name: runs[name] for name in names}, keys[names[0]], first) for names in groups.values()]


def setting(settings: Mapping[str, Any]) -> str:
    """What every table says about the setting of a run, besides the density."""
    return f"{settings['stream']} {settings['data']} x{settings['tasks']} {settings['preset']}"


def _key(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same in all runs of a row."""
    settings = {name: value for name, value in results["config"].items() if name not in _IGNORED}
    fingerprint = str(results.get("data_fingerprint", ""))[:12]  # as the file says, so it may be any text
    return {**settings, _FINGERPRINT: "".join(c for c in fingerprint if c.isalnum())}


def _row(runs: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any], keys: Sequence[Mapping[str, Any]]) -> Row:
    by_seed: dict[int, list[Mapping[str, Any]]] = {}
    for results in runs.values():
        by_seed.setdefault(results["config"]["seed"], []).append(results)
    numbers = {name: _spread([fmean(run[name] for run in same) for same in by_seed.values()]) for name in AVERAGED}
    one = next(iter(runs.values()))
    alike = [key for key in keys if all(key[name] == own[name] for name in _NAMED)]
    other = [name for name in own if any(key.get(name) != own[name] for key in alike)]
    words = [setting(own), *(f"{name} {own[name]}" for name in other)]
    return Row(one["config"], ", ".join(words), list(runs), len(by_seed), numbers, beside_paper(one))


def _spread(values: Sequence[float]) -> Spread:
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)
