"""Shapes of layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearShape:
    """``rows`` of a batch through a layer ``[outputs, inputs]``."""

    outputs: int
    inputs: int
    rows: int

    def __str__(self) -> str:
        return f"{self.outputs}x{self.inputs} b{self.rows}"

    @property
    def input_size(self) -> tuple[int, ...]:
        """Of the batch."""
        return self.rows, self.inputs


@dataclass(frozen=True)
class ConvShape:
    """A batch of square images through a square two-dimensional convolution."""

    batch: int
    channels: int
    size: int
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    def __str__(self) -> str:
        name = f"{self.channels}x{self.size}x{self.size} to {self.outputs}, {self.kernel}x{self.kernel}"
        name += f" s{self.stride} p{self.padding}" + (f" g{self.groups}" if self.groups > 1 else "")
        return f"{name} b{self.batch}"

    @property
    def input_size(self) -> tuple[int, ...]:
        """Of the batch."""
        return self.batch, self.channels, self.size, self.size

    @property
    def out_size(self) -> int:
        """Height and width of the result."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1
