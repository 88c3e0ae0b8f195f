"""Import this first, and torchvision can be imported beside a CPU build of torch.

CLArena and Lightning import torchvision where it is installed. Its wheel does not load its compiled part beside such a
torch, and then its Python part misses two operators: they are declared here.
"""

from __future__ import annotations

import torch


def _import() -> torch.library.Library | None:
    try:
        import torchvision
    except ImportError:
        return None
    except RuntimeError:
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        return operators
    return None


_OPERATORS = _import()  # they go with this object
