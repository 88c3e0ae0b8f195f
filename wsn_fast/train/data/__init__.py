"""Datasets as uint8 tensors. They are read from a data folder; only the small `digits` set comes with the package.

The readers do not trust the files: for every fault they raise a `DataError` that names the file and the fault.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wsn_fast.train.choices import DATASETS
from wsn_fast.train.data.cifar import load_cifar
from wsn_fast.train.data.dataset import Dataset
from wsn_fast.train.data.files import DataError
from wsn_fast.train.data.idx import load_idx
from wsn_fast.train.data.image_folder import load_image_folder
from wsn_fast.train.data.loading import Shows, shows_nothing
from wsn_fast.train.data.omniglot import load_omniglot

__all__ = ["DATASETS", "DataError", "Dataset", "load", "load_several"]


def load(name: str, data_dir: str | os.PathLike[str] | None = None, shows: Shows = shows_nothing) -> Dataset:
    """Load a dataset.

    Args:
        name: `digits` (vendored), `mnist` and `fashion_mnist` (idx files, plain or gzip), `cifar10` and
            `cifar100` (the official python pickles, as a folder or as the official .tar.gz), `omniglot` (the official
            zip archives, any of them), or `folder` (`train/<class>/*.png|jpg|jpeg`, and `val` or `test` alike; also
            TinyImageNet's layout). Folder images become RGB and must share one size.
        data_dir: Folder that holds the files. Not used for `digits`.
        shows: Shows how far the images are, where each is in a file of its own.

    Returns:
        The dataset, uint8 images [N, C, H, W] and int64 labels [N].

    Raises:
        ValueError: If `name` is unknown or `data_dir` is missing.
        DataError: If a file is missing, damaged or inconsistent.
        ImportError: If images need Pillow and it is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"name: expected one of {', '.join(DATASETS)}, got {name!r}")
    if name == "digits":
        return _load_digits()
    if data_dir is None:
        raise ValueError(f"data_dir: dataset {name!r} is read from a folder, and none was given")
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"{root}: not a folder (data_dir of dataset {name!r})")
    if name == "folder":
        return load_image_folder(root, shows)
    if name == "omniglot":
        return load_omniglot(root, shows)
    return load_cifar(name, root) if name.startswith("cifar") else load_idx(name, root)


def load_several(
    names: str, data_dir: str | os.PathLike[str] | None = None, shows: Shows = shows_nothing
) -> list[Dataset]:
    """Load several datasets.

    Args:
        names: Their names, with commas between them. A name that is not in `DATASETS` is that of a folder of images in
            `data_dir`.
        data_dir: Folder that holds the files. If it has a folder with the name of a dataset, the files of that dataset
            are there.
        shows: See :func:`load`.

    Raises:
        ValueError, DataError, ImportError: See :func:`load`.
    """
    datasets = []
    for name in names.split(","):
        inner = None if data_dir is None else Path(data_dir, name)
        if name in DATASETS:
            datasets.append(load(name, inner if inner is not None and inner.is_dir() else data_dir, shows))
        else:
            datasets.append(replace(load("folder", inner, shows), name=name))
    return datasets


def _load_digits() -> Dataset:
    path = Path(__file__).with_name("digits.npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            parts = [torch.from_numpy(arrays[key]) for key in ("train_x", "train_y", "test_x", "test_y")]
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise DataError(f"{path}: the vendored data cannot be read ({error})") from error
    return Dataset("digits", parts[0], parts[1].long(), parts[2], parts[3].long(), 10)
