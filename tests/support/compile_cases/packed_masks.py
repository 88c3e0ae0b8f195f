"""Compile cases of ``wsn_fast.kernels.packed_masks``."""

from __future__ import annotations

import torch
from compiling import CompileCase

from wsn_fast.kernels.packed_masks import CONFIGS, pack, popcount, union, unpack

from ._launches import distinct, written_down

N, TASKS = 256, 3


def compile_cases() -> list[CompileCase]:
    """Every kernel with every tile shape, with tensors that begin at a multiple of 16 bytes and ones that do not."""
    cases = []
    for config in CONFIGS:
        for begin in (0, 1):
            mask, packed = torch.empty(N + 16, dtype=torch.bool)[begin:][:N], torch.empty(N, dtype=torch.uint8)[begin:]
            rows = torch.empty(TASKS * N + 16, dtype=torch.uint8)[begin:][: TASKS * N].view(TASKS, N)
            with written_down() as launched:
                pack(mask, packed[: N // 8], config=config)
                unpack(packed[: N // 8], mask, config=config)
                union(rows, torch.empty(N, dtype=torch.uint8), config=config)
                popcount(rows, torch.empty((), dtype=torch.int64), config=config)
            label = f"{config.block}x{config.num_warps}" + " not aligned" * begin
            cases += [case._replace(name=f"{case.name} {label}") for case in launched]
    return distinct(cases)
