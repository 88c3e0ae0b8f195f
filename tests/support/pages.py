"""The report's page taken apart, and records of runs to put on it."""

from __future__ import annotations

from datetime import datetime, timezone
from html.parser import HTMLParser
from typing import Any

from wsn_fast.train import page
from wsn_fast.train.config import portable, resolve
from wsn_fast.train.records import Record
from wsn_fast.train.task_logs import Epoch, TaskLog

NOON = datetime(2025, 1, 2, 12, 0, tzinfo=timezone.utc)


def made_up(tasks: int = 3, name: str = "runs/a", **given: Any) -> Record:
    """A finished run with numbers that are easy to recognise."""
    settings = portable(resolve(**{"tasks": tasks, **given}))
    shares = [{"task": t, "density": 30.0, "reuse": 0.0 if t == 0 else 50.0, "new": 15.0} for t in range(tasks)]
    row = [90.25 + task for task in range(tasks)]
    results: dict[str, Any] = {
        "accuracy_matrix": [[*row[: i + 1], *[None] * (tasks - i - 1)] for i in range(tasks)],
        "acc": 95.5, "bwt": 0.0, "fwt": 1.25, "forgetting": [0.0] * tasks,
        "capacity": 88.5, "capacity_paper": 77.25, "union_density": 70.0, "compression": 12.0,
        "reuse": shares, "random_init": [10.0] * tasks, "before_training": [11.0] * tasks,
        "layers": [{"name": f"{x}.weight", "elements": 12345, "tasks": shares} for x in ("first", "second")],
        "overlap": [[100.0 if i == j else 62.5 for j in range(tasks)] for i in range(tasks)],
        "config": settings, "versions": {"torch": "9.9"}, "data_fingerprint": "f" * 32,
    }  # fmt: skip
    paths = [{"operation": "gate", "backend": "native", "reason": "because", "layers": ["first", "second"]}]
    curve = [Epoch(1, 0.5, 0.25, 92.5), Epoch(2, 0.125, 0.375, 91.5)]
    time = {"data": 0.5, "training": 2.0, "evaluation": 1.0, "checkpoints": 0.5}
    logs = [TaskLog(t, 2, 1, 0.5, 1000, "torch Adam", paths, curve, time) for t in range(tasks)]
    return Record(name, settings, "wsn-fast train", {"torch": "9.9"}, results, True, logs, NOON, [])


class Page(HTMLParser):
    """A page taken apart: its elements, with their attributes, texts and the elements around them."""

    VOID = ("meta", "br", "link", "img")
    DASHES = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.wrong += [f"{element['tag']} is not closed" for element in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "attributes": dict(attrs), "text": "", "inside": [e["tag"] for e in self._open]}
        element["around"] = list(self._open)
        self.elements.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1]["tag"] != tag:
            self.wrong.append(f"unexpected </{tag}>")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element["text"] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if element["tag"] == tag]

    def rows(self, caption: str) -> list[list[str]]:
        """The cells of the table whose caption begins so."""
        of_caption = [e["around"][-1] for e in self.all("caption") if e["text"].startswith(caption)]
        assert len(of_caption) == 1, [e["text"] for e in self.all("caption")]
        rows = [e for e in self.all("tr") if any(around is of_caption[0] for around in e["around"])]
        return [
            [
                e["text"].translate(self.DASHES)
                for e in self.elements
                if e["tag"] in ("th", "td") and e["around"][-1] is row
            ]
            for row in rows
        ]


def render(*runs: Record, problems: tuple[str, ...] = ()) -> Page:
    return Page(page.render(runs, problems, NOON))
