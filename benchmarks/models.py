"""``python -m benchmarks.models`` checks small models of transformers, timm, torchvision and torch, and writes the
table of the documentation.

It prints a line for each model and writes ``docs/results/models.json`` and ``docs/results/models.md``. The models and
the check are those of ``tests/support/ecosystem``, which ``.ci/ecosystem`` runs as tests.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .provenance import ROOT, provenance
from .tables import table

if str(ROOT / "tests" / "support") not in sys.path:
    sys.path.append(str(ROOT / "tests" / "support"))

FOLDER = ROOT / "docs" / "results"
PACKAGES = ("torch", "transformers", "timm", "torchvision")
COLUMNS = {
    "adamw": "two tasks, AdamW",
    "one_pass": "two tasks, one pass",
    "dense": "dense",
    "load": "load",
    "pickle": "pickle",
    "copy": "copy",
    "probe": "probe",
}
"""The promises of a result, and their columns in the page."""
_ABOUT = """
`python -m benchmarks.models` wrote this page. Every model has random weights and is as small as its class permits. Two
tasks are trained, two steps each, once with `wsn.guard(torch.optim.AdamW(..., weight_decay=0.1))` and once with
`SubnetAdamW(one_pass=True)`. All comparisons are to the bit, and a column says "yes" only if it holds after both.

| column | what it says |
|---|---|
| parameters | the floating elements of the dense model |
| gated | the share of them that has scores and masks, without heads and norms |
| typed | what was typed for `convert` and `WSN` besides the density |
| two tasks | the first task computes what it computed when it ended, after a second task was trained |
| dense | `to_dense` computes what each task computes |
| load | a newly converted model that has strictly loaded the state does |
| pickle, copy | a pickled copy and a deep copy do; "yes" also if the dense model permits neither |
| probe | `verify(probe=...)` finds nothing that a task must not read |
"""


def run(name: str) -> dict[str, Any]:
    """Check one model in this process, with one thread."""
    torch.set_num_threads(1)  # the tensors are small
    check, models = _imported()
    result = check.check(name, models[name])
    return result.as_json() | {"line": result.line()}


def _imported() -> tuple[Any, Mapping[str, Any]]:
    """The check, and the table of models. They are imported late, because the page is written without them."""
    from ecosystem import check, zoo

    return check, zoo.table()


def results(names: Sequence[str], jobs: int) -> Iterator[dict[str, Any]]:
    """Check the models in ``jobs`` processes and yield each result as it comes."""
    if jobs == 1:
        yield from map(run, names)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, name) for name in names]):
            yield future.result()


# --- the page
def page(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of the documentation."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    counts = Counter(row["package"] for row in rows)
    parts = ", ".join(f"{number} of {name}" for name, number in counts.items())
    good = sum(not _faults(row) for row in rows)
    lines = [
        "# Models that were tried",
        "",
        f"{len(rows)} models ({parts}) on {str(facts['date'])[:10]} with {versions} and Python {facts['python']}, at "
        f"commit {str(facts['commit'])[:7]}. Of these, {good} keep every promise below.",
        *_ABOUT.splitlines(),
        "",
        *table(("package", "class", "parameters", "gated", "typed", *COLUMNS.values()), map(_cells, rows), align=False),
        "",
    ]
    faults = [f"- {row['model']}: {text}" for row in rows for text in _faults(row)]
    if faults:
        lines += ["## What is not kept", "", *faults, ""]
    exceptions = [f"- {row['model']}: {row['exception']}" for row in rows if row["exception"]]
    if exceptions:
        lines += ["## Why less is gated in some models", "", *exceptions, ""]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> Iterable[str]:
    typed = ", ".join(row["typed"]) if len(row["typed"]) <= 3 else f"{len(row['typed'])} names"
    yield from (row["package"], f"`{row['kind']}`", f"{row['parameters']:,}", f"{row['share']:.1%}", typed or "nothing")
    for column in COLUMNS:
        yield row[column] if row[column] in ("yes", "-") else "**no**"


def _faults(row: Mapping[str, Any]) -> list[str]:
    texts = ((title, " ".join(row[column].split())) for column, title in COLUMNS.items())
    return [f"{title}: {text[:200]}" for title, text in texts if text not in ("yes", "-")]


def _stored(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of ``models.json``: a line for each model, without tracebacks."""
    lines = [json.dumps({name: value for name, value in row.items() if name != "traces"}) for row in rows]
    return f'{{"facts": {json.dumps(facts)},\n"models": [\n' + ",\n".join(lines) + "\n]}\n"


def _facts() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "(not installed)"
    return {**provenance(torch.device("cpu")), "versions": versions}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. The exit status is 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="models whose name has one of the texts"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many processes share the work")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder of models.json and models.md")
    parser.add_argument("--page-only", action="store_true", help="write the page from models.json, and check nothing")
    options = parser.parse_args(arguments)
    data, text = options.out / "models.json", options.out / "models.md"
    if not options.page_only:
        _, models = _imported()
        for name in (name for name, model in models.items() if model.lacks):
            print(f"{name}: left out, {models[name].lacks}")
        names = [n for n, m in models.items() if not m.lacks and any(one in n for one in options.only)]
        order = {name: place for place, name in enumerate(names)}
        rows = []
        for row in results(names, options.jobs):
            print(row.pop("line"), flush=True)
            rows.append(row)
        rows.sort(key=lambda row: order[row["model"]])
        data.write_text(_stored(_facts(), rows), "utf-8")
    stored = json.loads(data.read_text("utf-8"))
    text.write_text(page(stored["facts"], stored["models"]), "utf-8")
    return int(any(map(_faults, stored["models"])))


if __name__ == "__main__":
    sys.exit(main())
