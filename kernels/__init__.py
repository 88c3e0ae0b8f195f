"""Triton kernels and their launchers, imported only as ``wsn_fast.kernels``.

Start with ``gate.py``, which applies the mask.

Everything here is stateless, and imports nothing of the rest of ``wsn_fast``. Launchers do not allocate: the caller
passes results and workspace, and may choose the tile shape. Imports inside this folder are relative, because the
package reaches it through a symlink.
"""
