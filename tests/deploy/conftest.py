"""The two stacks: either variant of the cluster's, and Compose's."""

from __future__ import annotations

import pytest

from tests.deploy.manifests import Document, variant
from tests.deploy.stacks import CLUSTER, VARIANTS, read_compose


@pytest.fixture(params=VARIANTS)
def stack(request: pytest.FixtureRequest) -> list[Document]:
    return variant(CLUSTER / request.param)


@pytest.fixture(scope="module")
def compose() -> Document:
    return read_compose()
