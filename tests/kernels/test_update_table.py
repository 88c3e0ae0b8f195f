"""How an update is cut into programs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wsn_fast.kernels.update_table import CODED_CONFIGS, CONFIGS, Config, spread

H200 = 132  # multiprocessors


@pytest.mark.parametrize("processors", [1, 20, H200])
@pytest.mark.parametrize("config", [*CONFIGS, *CODED_CONFIGS["8bit"], *CODED_CONFIGS["8bit, float32"]])
def test_programs_follow_the_elements_and_the_multiprocessors(config: Config, processors: int) -> None:
    at_once = config.resident * processors
    for elements in (1, 512, 513, 100_000, 2**20, 3 * 2**20, 2**24, 11_000_000, 2**26, 2**33):
        cut = spread(config, elements, processors)
        blocks, programs = -(-elements // cut.block), -(-elements // cut.items)
        assert cut == replace(config, items=cut.items) and cut.items % cut.block == 0
        of_threads = 65535 if config.has_values else 255 * 32 * cut.num_warps
        assert cut.items <= min(config.items, of_threads, 65535)
        if blocks <= at_once:
            assert programs == blocks, "a program for every block"
        rounds = -(-programs // at_once)
        assert rounds == 1 or cut.items * at_once * (rounds - 1) < elements, "no more rounds than it takes"
        assert rounds == -(-elements // (config.items * at_once)), "no more rounds than the limit of a program asks for"


def test_an_h200_gets_all_its_multiprocessors_busy() -> None:
    assert [-(-n // spread(CONFIGS[0], n, H200).items) for n in (2**18, 2**20, 2**24, 2**26)] == [512, 683, 781, 2341]
