"""The parts of the page that compare runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from statistics import fmean

from wsn_fast.page.markup import Html, escape, figure, fill, join, table, unfold
from wsn_fast.page.numbers import NONE, duration, fixed, rate
from wsn_fast.train.figures import Chart, Line, lines, owned, svg
from wsn_fast.train.page.numbers import Entry, samples_per_second, total_seconds
from wsn_fast.train.paper_numbers import beside_paper
from wsn_fast.train.seeds import AVERAGED, Spread, over_seeds

Entries = Sequence[Entry]


# --- numbers ----------------------------------------------------------------------------------------------
def summary(entries: Entries) -> Html:
    """The main numbers, with a row per run, and how the runs differ from the paper's setting."""
    paper = {entry.number: beside_paper(entry.run.results) for entry in entries if entry.run.results}
    known = any(paper.values())
    head = ["run", "tasks", "density", "ACC", "BWT", "FWT", "forgetting", "CAP", "CAP*", "samples/s", "time"]
    head += ["paper: ACC", "paper: CAP"] if known else []
    rows = []
    for entry in entries:
        run, results, row = entry.run, entry.run.results, paper.get(entry.number)
        done = len(results["accuracy_matrix"]) if results else 0
        tasks = str(done) if run.finished else f"{done} of {run.settings['tasks']}"
        cells = [_run(entry), tasks, f"{run.settings['density']:g}"]
        if results is None:
            cells += [NONE] * 6
        else:
            cells += [fixed(results["acc"]), fixed(results["bwt"], sign=True), fixed(results["fwt"], sign=True)]
            cells += [fixed(x) for x in (max(results["forgetting"]), results["capacity_paper"], results["capacity"])]
        cells += [rate(samples_per_second(run)), duration(total_seconds(run))]
        if known and results is not None and row is not None:
            cells += [_beside(row[0], results["acc"]), _beside(row[1], results["capacity_paper"])]
        elif known:
            cells += [NONE, NONE]
        rows.append(cells)
    caption = "Runs" + (
        " beside the paper, where the setting is the paper's (in brackets: the run's less the paper's)" if known else ""
    )
    return join([table(caption, head, rows, cards=True), _over_seeds(entries), _otherwise(entries, paper)])


def _over_seeds(entries: Entries) -> Html:
    """Means over seeds, if several runs differ in the seed alone."""
    runs = {str(entry.number): entry.run.results for entry in entries if entry.run.results is not None}
    rows = over_seeds(runs)
    if all(row.seeds == 1 for row in rows):
        return Html("")
    known = any(row.paper for row in rows)
    head = ["setting", "runs", "seeds", "density", "ACC", "BWT", "FWT", "CAP", "CAP*"]
    head += ["paper: ACC", "paper: CAP"] if known else []
    body = []
    for row in rows:
        cells = [row.setting, ", ".join(row.runs), row.seeds, f"{row.settings['density']:g}"]
        cells += [_spread(row.numbers[name], sign=name in ("bwt", "fwt")) for name in AVERAGED]
        if known:
            cells += [fixed(x) for x in row.paper[:2]] if row.paper else [NONE, NONE]
        body.append(cells)
    caption = "Over seeds: mean and sample standard deviation (n - 1) of finished runs that differ in the seed alone"
    return table(caption, head, body, cards=True)


def _spread(spread: Spread, *, sign: bool) -> Html:
    mean = fixed(spread.mean, sign=sign)
    return mean if spread.deviation is None else fill("$mean ± $other", mean=mean, other=fixed(spread.deviation))


def _run(entry: Entry) -> Html:
    settings = entry.run.settings
    return fill(
        "$swatch$number. $link<br><small>$stream $data, $preset, $net</small>",
        swatch=entry.swatch, number=entry.number, link=entry.link,
        **{name: settings[name] for name in ("stream", "data", "preset", "net")},
    )  # fmt: skip


def _beside(paper: float, own: float) -> Html:
    return fill('$paper <small class="gap">($gap)</small>', paper=fixed(paper), gap=fixed(own - paper, sign=True))


def _otherwise(entries: Entries, paper: Mapping[int, tuple[float, float, str] | None]) -> Html:
    found = [(entry, row[2]) for entry in entries if (row := paper.get(entry.number)) is not None]
    if not found:
        return Html("<p>No finished run has a setting that the paper has numbers for.</p>\n")
    items = [
        fill("<li>$number: $what</li>\n", number=e.number, what=what or "nothing but perhaps seed and device")
        for e, what in found
    ]
    text = "<p>The paper's numbers are means over its seeds. What these runs do otherwise:</p>\n<ul>\n$items</ul>\n"
    return fill(text, items=join(items))


# --- pictures ---------------------------------------------------------------------------------------------
def charts(entries: Entries) -> Html:
    """Charts of the accuracy, of the weights owned and of the time, task by task."""
    average, accuracy, owned_so_far, seconds = [], [], [], []
    for entry in entries:
        number, label, results = entry.number, entry.label, entry.run.results
        if results is not None:
            paper = beside_paper(results)
            means = [fmean(row[: i + 1]) for i, row in enumerate(results["accuracy_matrix"])]
            average.append(Line(number, label, means))
            accuracy.append(Line(number, label, results["accuracy_matrix"][-1], paper and paper[0]))
            owned_so_far.append(Line(number, label, owned(results["reuse"])))
        if any(task.epochs for task in entry.run.tasks):
            seconds.append(Line(number, label, [task.epoch_seconds for task in entry.run.tasks]))
    dotted = " Dotted: the paper's ACC for the setting." if any(line.level for line in accuracy) else ""
    return join(
        [
            _chart(
                "average", Chart("Average accuracy so far", "test accuracy (%)", average, over_time=True),
                "The mean test accuracy over the tasks up to each, measured when it had been trained. The last is ACC.",
            ),
            _chart(
                "accuracy", Chart("Accuracy on each task at the end", "test accuracy (%)", accuracy),
                "Test accuracy after the last finished task." + dotted,
            ),
            _chart(
                "owned",
                Chart("Weights owned by any task so far", "share of gated weights (%)", owned_so_far, True, True),
                "The share of all gated weights that the tasks up to each own: what is left is free for later tasks.",
            ),
            _chart(
                "seconds", Chart("Time per epoch", "seconds", seconds, True),
                "Mean seconds per epoch of each task, with the validation after it.",
            ),
        ]
    )  # fmt: skip


def _chart(name: str, chart: Chart, caption: str) -> Html:
    if not chart.lines:
        return Html("")
    height = 3.6 + 0.2 * ((len(chart.lines) + 1) // 2)
    digits = 3 if chart.unit == "seconds" else 2
    rows = [
        [position, *(fixed(value, digits) for value in values)]
        for position, values in enumerate(zip_longest(*(line.values for line in chart.lines)))
    ]
    head = ["task, in order", *(line.label for line in chart.lines)]
    known = {line.number: [value for value in line.values if value is not None] for line in chart.lines}
    means = "; ".join(f"run {number}: mean {fmean(values):.{digits}f}" for number, values in known.items())
    return figure(
        svg(lines, chart, name, (6.4, height)),
        f"{'Line' if chart.over_time else 'Dot'} chart: {chart.title}, {chart.unit}. {means}.",
        caption,
        table(f"{chart.title}, {chart.unit}", head, rows, ()),
    )


# --- settings and paths -----------------------------------------------------------------------------------
def settings(entries: Entries) -> Html:
    """The settings that differ between the runs, and those that are the same in all."""
    of_runs = [
        {
            **{name: _plain(value) for name, value in entry.run.settings.items()},
            **{
                f"version of {name}" if name != "device" else "device used": v for name, v in entry.run.versions.items()
            },
            "data fingerprint": str((entry.run.results or {}).get("data_fingerprint", ""))[:12] or None,
        }
        for entry in entries
    ]
    names = list(dict.fromkeys(name for own in of_runs for name in own))
    rows = {name: [own.get(name) for own in of_runs] for name in names}
    other = {name: row for name, row in rows.items() if len({*row} - {None}) > 1}
    same = [[name, _shown(row[0])] for name, row in rows.items() if name not in other]
    common = unfold(
        "Settings that all have in common", table("The same in all runs", ["setting", "value"], same, (0, 1))
    )
    if len(entries) == 1:
        return table("Settings", ["setting", "value"], same, (0, 1))
    if not other:
        return join([Html("<p>The runs have the same settings and versions.</p>\n"), common])
    head = ["setting", *(entry.label for entry in entries)]
    body = [[name, *map(_shown, row)] for name, row in other.items()]
    return join([table("What differs between the runs", head, body, range(len(head))), common])


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(value: object) -> Html:
    return NONE if value is None else escape(value)


def paths(entries: Entries) -> Html:
    """Which backend ran each operation, with a column per run."""
    rows: dict[str, list[dict[str, None]]] = {}  # per operation and run, in the order of the tasks
    for column, entry in enumerate(entries):
        for task in entry.run.tasks:
            chosen = [("optimizer", task.optimizer)] if task.optimizer else []
            chosen += [(path["operation"], path["backend"]) for path in task.paths]
            for operation, what in chosen:
                rows.setdefault(operation, [{} for _ in entries])[column][what] = None
    if not rows:
        return Html("<p>None of these runs wrote down what ran its operations.</p>\n")
    head = ["operation", *(entry.label for entry in entries)]
    body = [[operation, *(", ".join(cell) or NONE for cell in cells)] for operation, cells in rows.items()]
    reasons = Html("<p>The reasons, layer by layer, are in the section of each run.</p>\n")
    return join([table("The optimizer, and what ran each operation", head, body, range(len(head))), reasons])
