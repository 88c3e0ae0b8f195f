"""Triton kernels and their launchers, imported only as ``wsn_fast.kernels``.

Everything here is stateless: a launcher neither allocates nor chooses, and imports nothing of the rest of
``wsn_fast``. Imports inside this folder are relative, because the package reaches it through a symlink.
"""
