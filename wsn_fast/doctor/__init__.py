"""``python -m wsn_fast.doctor`` says what is installed, which backend runs each operation, and what you can do to
make the library faster."""
