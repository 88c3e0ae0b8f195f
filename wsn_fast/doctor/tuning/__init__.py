"""``python -m wsn_fast.doctor --tune`` measures which tiles and which backends are fastest on this machine."""
