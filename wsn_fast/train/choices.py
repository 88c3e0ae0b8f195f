"""The words among which the settings of a run choose. This file imports nothing, so that the command line knows them
without PyTorch."""

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folder")
KINDS = ("permuted", "split", "rotated")
"""How the tasks of a stream are made."""

NETS = ("mlp", "lenet", "lenet_large", "alexnet", "resnet18", "resnet18_stateless", "convnet4")
OPTIMIZERS = ("adam", "adamw", "sgd")
DEVICES = ("auto", "cpu", "cuda")
CUDA_GRAPH = ("auto", "off")


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
    return {"cifar10": "alexnet", "cifar100": "alexnet", "folder": "convnet4"}.get(dataset_name, "lenet")
