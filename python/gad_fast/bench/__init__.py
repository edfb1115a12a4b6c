"""Benchmarks that a user can run: each times ours and its peers in one run, turn by turn."""
