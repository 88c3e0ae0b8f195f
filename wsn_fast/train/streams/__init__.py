"""Streams of tasks: permuted pixels, split classes, rotated images, superclasses, several datasets in a row, and tasks
of one's own."""

from wsn_fast.train.streams.interface import Stream
from wsn_fast.train.streams.own import OwnStream
from wsn_fast.train.streams.stream import TaskData, TaskStream

__all__ = ["OwnStream", "Stream", "TaskData", "TaskStream"]
