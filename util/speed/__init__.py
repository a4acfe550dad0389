"""Counting and measuring, for benchmarks and tests."""
