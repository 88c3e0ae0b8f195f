"""The samples of a task: they are in memory, or they are loaded batch by batch."""

from wsn_fast.train.samples.batch import Batch, Epoch, Share, parts_of
from wsn_fast.train.samples.kept import KeptSamples
from wsn_fast.train.samples.memory import SamplesInMemory
from wsn_fast.train.samples.samples import Samples

__all__ = ["Batch", "Epoch", "KeptSamples", "Samples", "SamplesInMemory", "Share", "parts_of"]
