"""Benchmarks: what the project's speed is, against what others do and against what the machine can do."""
