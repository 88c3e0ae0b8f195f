"""Other people's frameworks over this library: ``lightning`` and ``clarena``. Each is imported by its own name, and
needs the extra of that name (``pip install "wsn-fast[lightning]"``)."""
