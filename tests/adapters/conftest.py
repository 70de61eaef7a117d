"""The tiny base with weights, for what is lowered with them."""

import pytest

from loramux_adapters import BaseModel

from .checkpoints import with_weights


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return with_weights(tmp_path_factory.mktemp("base"))
