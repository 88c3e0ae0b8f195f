"""The one list of shapes, for ``pytest benchmarks`` and the device report."""

from __future__ import annotations

from dataclasses import dataclass

from wsn_fast.doctor.measuring.shapes import ConvShape, LinearShape


@dataclass(frozen=True)
class NetShape:
    """A batch of ``rows`` inputs through one of the paper's nets, by its name in :mod:`wsn_fast.train.nets`."""

    net: str
    inputs: tuple[int, ...]
    classes: int
    rows: int

    def __str__(self) -> str:
        return f"{self.net} {'x'.join(map(str, self.inputs))} b{self.rows}"

    @property
    def input_size(self) -> tuple[int, ...]:
        """Of the batch."""
        return self.rows, *self.inputs


@dataclass(frozen=True)
class Shapes:
    """One choice of shapes; the most telling ones come first."""

    thresholds: tuple[int, ...]  # numbers of scores
    worst: int  # number of scores of awkward distributions
    many: tuple[int, int, int]  # how many tensors one call selects from, sizes of the smallest and the largest
    kthvalue_limit: int  # kthvalue runs in a single block on a GPU: it is not tried with more scores
    elementwise: tuple[int, ...]  # numbers of weights
    tasks: int  # packed masks in a union
    conv_steps: tuple[ConvShape, ...]  # convolutions
    steps: tuple[LinearShape, ...]  # linear layers
    more_steps: tuple[LinearShape, ...]  # further ones
    nets: tuple[NetShape, ...]
    inference: tuple[NetShape, ...]  # nets for the inference of a finished task


# The paper's data: Permuted MNIST, and the same with a larger batch; CIFAR-100 Superclass; 5-Datasets; CIFAR-100 Split;
# Omniglot Rotation.
MLP, MLP_64 = (NetShape("mlp", (1, 28, 28), 10, rows) for rows in (10, 64))
LENET = NetShape("lenet", (3, 32, 32), 5, 64)
RESNET = NetShape("resnet18_stateless", (3, 32, 32), 10, 64)
ALEXNET = NetShape("alexnet", (3, 32, 32), 10, 64)
LENET_LARGE = NetShape("lenet_large", (1, 32, 32), 12, 64)

MILLION, LAYER, LARGE, HUGE = 1 << 20, 1 << 24, 1 << 26, 1 << 30  # 1.05 M, 16.8 M, 67 M and 1.07 G scores

TINY = Shapes(  # all code and no times: for dry runs, in Triton's interpreter as well
    thresholds=(1000,), worst=300, many=(3, 10, 200), kthvalue_limit=500, elementwise=(1000,), tasks=3,
    conv_steps=(ConvShape(2, 3, 6, 4, 3, padding=1),),
    steps=(LinearShape(24, 40, 5),), more_steps=(LinearShape(16, 24, 3),),
    nets=(NetShape("mlp", (1, 4, 4), 3, 5), NetShape("lenet", (1, 4, 4), 3, 5)),
    inference=(NetShape("mlp", (1, 4, 4), 3, 5),),
)  # fmt: skip
SMALL = Shapes(  # `pytest benchmarks`: under three minutes on two cores of a CPU
    thresholds=(MILLION,), worst=100_000, many=(10, 100, 100_000), kthvalue_limit=MILLION, elementwise=(MILLION,),
    tasks=5, conv_steps=(ConvShape(8, 32, 16, 64, 3, padding=1),),
    steps=(LinearShape(1024, 1024, 64), LinearShape(2048, 2048, 64)), more_steps=(), nets=(MLP,), inference=(MLP_64,),
)  # fmt: skip
LARGE_CPU = Shapes(  # the published numbers of a CPU
    thresholds=(MILLION, LAYER), worst=LAYER, many=(100, 1000, MILLION), kthvalue_limit=LAYER, elementwise=(LAYER,),
    tasks=10, conv_steps=(ConvShape(64, 64, 32, 128, 3, padding=1),),
    steps=(LinearShape(2048, 2048, 64), LinearShape(1024, 1024, 64), LinearShape(100, 784, 10)),
    more_steps=(), nets=(MLP, MLP_64, LENET, RESNET, ALEXNET), inference=(MLP_64, ALEXNET),
)  # fmt: skip
_BATCHES = (256, 32, 4096, 16384)
GPU = Shapes(  # the published numbers of a GPU
    thresholds=(LAYER, MILLION, LARGE, HUGE), worst=LAYER, many=(100, 1000, 4 * MILLION), kthvalue_limit=LAYER,
    elementwise=(LAYER, LARGE), tasks=16, conv_steps=(ConvShape(64, 256, 16, 256, 3, padding=1),),
    steps=tuple(LinearShape(4096, 4096, rows) for rows in _BATCHES),
    more_steps=tuple(LinearShape(*size, rows) for size in ((1024, 1024), (4096, 16384)) for rows in _BATCHES),
    nets=(MLP, MLP_64, LENET, RESNET, ALEXNET, LENET_LARGE), inference=(MLP_64, ALEXNET),
)  # fmt: skip

PROFILES = {"tiny": TINY, "small": SMALL, "large": LARGE_CPU, "gpu": GPU}
