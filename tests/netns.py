"""Two hosts on one machine (`hpc.bench.namespaces`), and which tests need them."""

from __future__ import annotations

import pytest

from hpc.bench.namespaces import Hosts, two_hosts, why_not

__all__ = ["Hosts", "needs_namespaces", "two_hosts", "why_not"]

needs_namespaces = pytest.mark.skipif(
    "bool(__import__('tests.netns').netns.why_not())", reason="see hpc/bench/namespaces.py"
)
