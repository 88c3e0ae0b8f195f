"""Streams of tasks: permuted pixels, split classes, rotated images, superclasses, several datasets in a row."""

from wsn_fast.train.streams.stream import TaskData, TaskStream

__all__ = ["TaskData", "TaskStream"]
