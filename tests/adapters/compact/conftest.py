from typing import Any

import pytest

from .tiny import make_model, make_tokenizer


@pytest.fixture(scope="session")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()
