"""Importing this first imports Avalanche without its warnings about packages that it does not need here."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import avalanche.training  # noqa: F401
