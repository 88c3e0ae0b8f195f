"""Modules: the gated layers, the heads of the tasks, and tensors with a copy per task."""
