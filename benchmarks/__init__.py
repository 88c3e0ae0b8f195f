"""Benchmarks: every speed stands beside a correctness check of the same call in the same run. See README.md."""
