"""One private cluster for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing, private_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(f"no private Slurm cluster: {why}")
    with private_cluster() as running:
        yield running
