"""Types by itself what a library that leaves tensors dense asks for, one error at a time, as its users have to.

It goes once ``WSN`` has the argument ``rest``.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

import wsn_fast
from wsn_fast import WSN, OwnershipError

NEEDED = "rest" not in inspect.signature(WSN).parameters
_NAMED = (
    re.compile(r"exclude_modules='([^']+)'"),
    re.compile(r"^(\S+)\.(?:weight|bias) is (?:tied|computed)"),
    re.compile(r"^(\S+)\.(?:weight|bias) must be non-empty"),
    re.compile(r"^(\S+)\.forward was replaced"),
    re.compile(r"^(\S+)\.weight and \S+ share memory"),
)


def convert(dense: nn.Module, heads: Any) -> tuple[nn.Module, list[str]]:
    """Convert, leaving out what an error names. Returns the model and what had to be typed."""
    given = [heads] if isinstance(heads, str) else list(heads or ())
    modules = dict(dense.named_modules())
    usable = {name: modules[name].out_features for name in given if type(modules[name]) is nn.Linear}
    excluded: list[str] = []
    while True:
        try:
            wsn_fast.convert(dense, density=0.5, heads=usable, exclude_modules=excluded)
            return dense, ["heads"][: len(given)] + excluded
        except ValueError as error:
            found = next((m[1] for pattern in _NAMED if (m := pattern.search(str(error)))), None)
            if found is None or found in excluded:
                raise
            excluded.append(found)


def owners(error: OwnershipError) -> dict[str, list[str]]:
    """Owners for all tensors that have none."""
    return {"per_task": error.names}


_LEFT = "none of its layers has one of the exact classes that are converted"
_READ = "a module reads the weight of a layer that it does not call"
_ROUNDED = "torch rounds the product with a weight that needs a gradient differently"
_CACHED = "it caches per-task biases in evaluation, which go on to the next task in use"
BROKEN = {
    "timm:levit_128s": _CACHED,
    "transformers:LevitForImageClassification": _CACHED,
    "torch:nn.EmbeddingBag": _LEFT,
    "timm:nf_resnet26": _LEFT,
    "transformers:FalconForSequenceClassification": _LEFT,
    "transformers:BitForImageClassification": _LEFT,
    "torchvision:swin3d_t": _READ,
    "transformers:MambaModel": _READ,
    "transformers:Mamba2Model": _READ,
    "transformers:FalconMambaModel": _READ,
    "transformers:JambaForSequenceClassification": _READ,
    "transformers:WavLMForSequenceClassification": _READ,
    "timm:davit_tiny": _ROUNDED,
    "timm:mixer": _ROUNDED,
    "transformers:LongformerForSequenceClassification": _ROUNDED,
    "transformers:LEDModel": _ROUNDED,
    "transformers:TimeSeriesTransformerModel": _ROUNDED,
    "transformers:InformerModel": _ROUNDED,
}
"""The models that break a promise now, and why."""
