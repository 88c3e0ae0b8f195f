"""The words among which the settings of a run choose. This file imports nothing, so that the command line knows them
without PyTorch."""

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "omniglot", "folder")
KINDS = ("permuted", "split", "rotated", "superclass", "datasets")
"""How the tasks of a stream are made from datasets."""
STREAMS = (*KINDS, "own")
"""Those, and tasks that code of one's own makes."""
ORDERED = ("split", "superclass")
"""The kinds whose tasks take classes in an order."""
FIVE_DATASETS = "cifar10,mnist,svhn,fashion_mnist,notmnist"
"""The paper's 5-Datasets, in its order; ``svhn`` and ``notmnist`` are folders of images."""

NETS = ("mlp", "lenet", "lenet_large", "alexnet", "resnet18", "resnet18_stateless", "convnet4")
OPTIMIZERS = ("adam", "adamw", "sgd")
DEVICES = ("auto", "cpu", "cuda")
CUDA_GRAPH = ("auto", "off")
MEMORY_FORMATS = ("contiguous", "channels_last")
AUGMENT = ("none", "crops")


def default_net(dataset_name: str, stream_kind: str) -> str:
    """The name of the net for a dataset and a stream. It is the paper's net if the paper has that pair.

    Permuted pixels have no neighbours, and digits are tiny, so both get the MLP.

    Args:
        dataset_name: Name of the dataset.
        stream_kind: Kind of the stream.

    Returns:
        One of `NETS`.
    """
    if stream_kind == "permuted" or dataset_name == "digits":
        return "mlp"
    if stream_kind in ("superclass", "datasets", "own"):
        return {"superclass": "lenet", "datasets": "resnet18", "own": "resnet18"}[stream_kind]
    nets = {"cifar10": "alexnet", "cifar100": "alexnet", "omniglot": "lenet_large", "folder": "convnet4"}
    return nets.get(dataset_name, "lenet")
