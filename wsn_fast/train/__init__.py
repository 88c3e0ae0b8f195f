"""The thin driver behind ``wsn-fast``: a stream of tasks, the paper's recipe, checkpoints, metrics, plots.

Code that makes a stream of tasks of its own returns :class:`Task`.
"""

from wsn_fast.train.task import Task

__all__ = ["Task"]
