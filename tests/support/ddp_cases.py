"""What DistributedDataParallel does with a WSN. A story tells what was wrong; the other cases raise if something is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddp_training import Story, one_pass

STORIES: dict[str, Story] = {
    "once": Story(),
    "each task": Story(wrap="each task"),
    "scores drawn anew": Story(options={"reinit_scores": True}),
    "scores drawn anew, each task": Story(options={"reinit_scores": True}, wrap="each task"),
    "accumulated": Story(accumulate=3),
    "one pass": Story(optimizer=one_pass, wrap="first task"),
    "one pass, each task": Story(optimizer=one_pass, wrap="each task"),
    "one pass, scores drawn anew": Story(optimizer=one_pass, wrap="first task", options={"reinit_scores": True}),
    "one pass, accumulated": Story(optimizer=one_pass, wrap="first task", accumulate=3),
}

CASES: dict[str, Callable[[int], Any]] = {name: story.run for name, story in STORIES.items()}
