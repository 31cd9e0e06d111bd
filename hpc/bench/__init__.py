"""Benchmarks: suites that measure, and tables and figures made from what they measured."""
