"""``benchmarks.peer``: the table, and the folder that it reads. ``tests/integrations/test_peer.py`` trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import peer


def made_up(program: str, seed: int) -> dict[str, object]:
    cpu = {"CLArena": 40.0, "on our backbone": 20.0, "ours": 10.0, "dense": 4.0}[program]
    times = {"cpu_s": cpu + seed, "elapsed_s": 2 * cpu}
    return {"program": program, "seed": seed, "acc": 90.0 + seed, "bwt": -seed, **times}


def test_the_table_has_means_single_runs_and_the_share_of_time() -> None:
    runs = [made_up(program, seed) for seed in (1, 3) for program in peer.PROGRAMS]
    lines = peer.table(runs).splitlines()
    assert len(lines) == 2 + len(peer.PROGRAMS)
    cells = "92.00 (91.00, 93.00) | -2.00 (-1.00, -3.00) | 12.0 (11.0, 13.0) | 20.0 (20.0, 20.0) | 0.29"
    assert lines[4] == f"| {peer.PROGRAMS['ours']} | {cells} |"


def test_a_folder_without_the_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peer.main([str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().err


def test_programs_get_the_same_tasks() -> None:
    data = peer.load("digits")
    first, second = (list(peer.tasks_of(data, 1, peer.SETTINGS)) for _ in range(2))
    assert len(first) == peer.SETTINGS["tasks"]
    for (one, x, _), (other, again, _) in zip(first, second, strict=True):
        assert x.equal(again)
        assert all(a.equal(b) for batch, twin in zip(one, other, strict=True) for a, b in zip(batch, twin, strict=True))
    assert not first[0][1].equal(first[1][1])
