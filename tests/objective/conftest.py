"""Models of the oracle's tests."""

import pytest
import torch

from .oracle_models import make_model


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def models(request):
    """A policy and a reference that differ."""
    return make_model(tied=request.param), make_model(tied=request.param, seed=1)


@pytest.fixture
def model(models):
    return models[0]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def stock(request):
    """A model as Transformers creates it, in fp32."""
    return make_model(tied=request.param, dtype=torch.float32)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices are too small for several threads to help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
