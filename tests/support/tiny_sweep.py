"""Tiny shapes of everything that the tuner measures, for Triton's interpreter."""

from __future__ import annotations

from wsn_fast.doctor.measuring.shapes import ConvShape
from wsn_fast.doctor.tuning.sweeps import IEEE, Sweep

SWEEP = Sweep(
    elementwise=1000,
    precisions=(IEEE,),
    sizes=((24, 40),),
    rows=(5,),
    grad_sizes=((24, 40),),
    grad_rows=(70,),
    tasks=2,
    task_sizes=((24, 40),),
    task_rows=(5,),
    convs=(ConvShape(2, 3, 6, 4, 3, padding=1),),
)
