"""The one list of shapes: what ``pytest benchmarks``, the device report and the tuner measure."""

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
    def out_size(self) -> int:
        """Height and width of the result."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1


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
    def convolutional(self) -> bool:
        """Whether it has convolutions."""
        return self.net != "mlp"


@dataclass(frozen=True)
class Shapes:
    """One choice of shapes.

    Attributes:
        thresholds: numbers of scores of the selection.
        worst: the number of scores of the selection on distributions other than the normal one; 0 for none.
        many: how many tensors the selection takes in one call, and the sizes of the smallest and the largest.
        kthvalue_limit: more scores than this are skipped by ``kthvalue``, which runs in a single block on a GPU.
        elementwise: numbers of weights of the elementwise operations.
        tasks: rows of packed masks in a union, and tasks in a mixed batch.
        products: [outputs, inputs] of masked products without a training step.
        product_rows: batch sizes of these.
        grad_rows: batch sizes of the gradients of weight and scores; the first of ``products`` alone.
        task_rows: batch sizes of products whose rows belong to different tasks.
        convs: convolutions without a training step.
        steps: linear layers for the training step, the most telling first.
        more_steps: further ones.
        conv_steps: convolutions for the training step.
        nets: whole nets for the training step.
    """

    thresholds: tuple[int, ...]
    worst: int
    many: tuple[int, int, int]
    kthvalue_limit: int
    elementwise: tuple[int, ...]
    tasks: int
    products: tuple[tuple[int, int], ...]
    product_rows: tuple[int, ...]
    grad_rows: tuple[int, ...]
    task_rows: tuple[int, ...]
    convs: tuple[ConvShape, ...]
    steps: tuple[LinearShape, ...]
    more_steps: tuple[LinearShape, ...]
    conv_steps: tuple[ConvShape, ...]
    nets: tuple[NetShape, ...]


# The paper's data: Permuted MNIST, and the same with a larger batch; CIFAR-100 Superclass; 5-Datasets; CIFAR-100 Split;
# Omniglot Rotation.
MLP, MLP_64 = (NetShape("mlp", (1, 28, 28), 10, rows) for rows in (10, 64))
LENET = NetShape("lenet", (3, 32, 32), 5, 64)
RESNET = NetShape("resnet18_stateless", (3, 32, 32), 10, 64)
ALEXNET = NetShape("alexnet", (3, 32, 32), 10, 64)
LENET_LARGE = NetShape("lenet_large", (1, 32, 32), 12, 64)

MILLION, LAYER, LARGE, HUGE = 1 << 20, 1 << 24, 1 << 26, 1 << 30  # 1.05 M, 16.8 M, 67 M and 1.07 G scores

TINY = Shapes(  # code paths, not times: the report's dry run, in Triton's interpreter as well
    thresholds=(1000,),
    worst=300,
    many=(3, 10, 200),
    kthvalue_limit=500,
    elementwise=(1000,),
    tasks=3,
    products=((24, 40),),
    product_rows=(5,),
    grad_rows=(5,),
    task_rows=(5,),
    convs=(ConvShape(2, 3, 6, 4, 3, padding=1),),
    steps=(LinearShape(24, 40, 5),),
    more_steps=(LinearShape(16, 24, 3),),
    conv_steps=(ConvShape(2, 3, 6, 4, 3, padding=1),),
    nets=(NetShape("mlp", (1, 4, 4), 3, 5), NetShape("lenet", (1, 4, 4), 3, 5)),
)
SMALL = Shapes(  # a CPU, in a minute
    thresholds=(100_000, MILLION),
    worst=100_000,
    many=(10, 100, 100_000),
    kthvalue_limit=MILLION,
    elementwise=(MILLION,),
    tasks=5,
    products=((512, 512),),
    product_rows=(16,),
    grad_rows=(16,),
    task_rows=(16,),
    convs=(ConvShape(8, 32, 16, 64, 3, padding=1),),
    steps=(LinearShape(100, 784, 10), LinearShape(512, 512, 64)),  # the first is the paper's on Permuted MNIST
    more_steps=(),
    conv_steps=(ConvShape(8, 32, 16, 64, 3, padding=1),),
    nets=(MLP, MLP_64, LENET),
)
LARGE_CPU = Shapes(  # the published numbers of a CPU
    thresholds=(MILLION, LAYER),
    worst=LAYER,
    many=(100, 1000, MILLION),
    kthvalue_limit=LAYER,
    elementwise=(LAYER,),
    tasks=10,
    products=((2048, 2048),),
    product_rows=(1, 16, 64),
    grad_rows=(64,),
    task_rows=(64,),
    convs=(ConvShape(64, 64, 32, 128, 3, padding=1),),
    steps=(LinearShape(2048, 2048, 64), LinearShape(1024, 1024, 64), LinearShape(100, 784, 10)),
    more_steps=(),
    conv_steps=(ConvShape(64, 64, 32, 128, 3, padding=1),),
    nets=(MLP, MLP_64, LENET, RESNET, ALEXNET),
)
GPU = Shapes(  # the published numbers of a GPU
    thresholds=(LAYER, MILLION, LARGE, HUGE),
    worst=LAYER,
    many=(100, 1000, 4 * MILLION),
    kthvalue_limit=LAYER,
    elementwise=(LAYER, LARGE),
    tasks=16,
    products=((4096, 4096), (4096, 16384)),
    product_rows=(1, 16, 32, 64, 128, 256),
    grad_rows=(32, 256, 4096, 16384),
    task_rows=(16, 64, 256),
    convs=(ConvShape(64, 64, 32, 128, 3, padding=1), ConvShape(64, 256, 16, 256, 3, padding=1)),
    steps=tuple(LinearShape(4096, 4096, rows) for rows in (256, 32, 4096, 16384)),
    more_steps=tuple(
        LinearShape(*size, rows) for size in ((1024, 1024), (4096, 16384)) for rows in (256, 32, 4096, 16384)
    ),
    conv_steps=(ConvShape(64, 256, 16, 256, 3, padding=1),),
    nets=(MLP, MLP_64, LENET, RESNET, ALEXNET, LENET_LARGE),
)

PROFILES = {"tiny": TINY, "small": SMALL, "large": LARGE_CPU, "gpu": GPU}
