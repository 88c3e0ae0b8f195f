"""Integrations with other frameworks: ``lightning``, ``avalanche``, ``transformers`` and ``clarena``. Each has to be
imported by its own name, and needs the extra of that name (``pip install "wsn-fast[lightning]"``)."""
