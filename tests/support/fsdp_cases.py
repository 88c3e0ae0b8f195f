"""What FSDP2 does with a WSN. A story tells what was wrong; the other cases raise if something is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ddp_training import adamw
from sharded_training import Story, sgd, subnet_adamw, transformer, uneven

STORIES: dict[str, Story] = {
    "one pass": Story(),
    "one pass, rule value": Story(make=partial(uneven, "value")),
    "one pass, cut in a task": Story(after_begin=True),
    "one pass, accumulated": Story(accumulate=3),
    "one pass, accumulated without averages": Story(accumulate=3, sync=False),
    "one pass, clipped": Story(clip=0.1),
    "one pass, gradients of 0": Story(zero=True),
    "one pass, scores drawn anew": Story(wsn_options={"reinit_scores": True}),
    "one pass, SGD": Story(optimizer=sgd),
    "standard": Story(optimizer=subnet_adamw),
    "standard, accumulated": Story(optimizer=subnet_adamw, accumulate=3),
    "standard, clipped": Story(optimizer=subnet_adamw, clip=0.1, accumulate=2, sync=False),
    "standard, gradients of 0": Story(optimizer=subnet_adamw, zero=True),
    "standard, SGD": Story(optimizer=partial(sgd, one_pass=False)),
    "guarded": Story(optimizer=adamw),
    "guarded, cut in a task": Story(optimizer=adamw, after_begin=True),
    "guarded, accumulated": Story(optimizer=adamw, accumulate=3),
    "kept between the passes": Story(options=lambda: {"reshard_after_forward": False}, accumulate=2),
    "blocks": Story(make=transformer, options=lambda: {"groups": ["blocks.0", "blocks.1"]}),
    "attention by itself": Story(make=transformer),
}

CASES: dict[str, Callable[[int], Any]] = {name: story.run for name, story in STORIES.items()}
