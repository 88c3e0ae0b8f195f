"""``python -m wsn_fast.doctor --report`` describes this machine and the library on it, in a page and in JSON."""
