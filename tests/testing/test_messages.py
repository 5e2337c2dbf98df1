"""References to functions, and the serialization of tensors."""

import pickle
import sys

import pytest
import torch

from megatron_idpo.testing.messages import FunctionReference, dumps, loads

SOURCE = """
class Holder:
    @staticmethod
    def method():
        return __name__

if __name__ == "__main__":
    raise SystemExit("the main block must not run")
"""


@pytest.fixture
def module_file(tmp_path):
    before = {*sys.modules}
    path = tmp_path / "script.py"
    path.write_text(SOURCE)
    yield path
    for name in {*sys.modules} - before:
        del sys.modules[name]


def test_function_is_imported_by_path_and_its_module_loaded_once(module_file):
    reference = FunctionReference("not.on.the.path", str(module_file), "Holder.method")
    function = reference.resolve()
    assert function() == "not.on.the.path"
    assert reference.resolve() is function


def test_function_is_imported_by_name_if_the_name_leads_to_its_file():
    import megatron_idpo.errors as errors

    reference = FunctionReference("megatron_idpo.errors", errors.__file__, "ConfigError.at")
    assert reference.resolve() == errors.ConfigError.at


def test_path_wins_if_the_name_leads_to_another_file(module_file, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    function = FunctionReference("colorsys", str(module_file), "Holder.method").resolve()
    assert function() == "colorsys"


def test_script_is_imported_without_running_its_main_block(module_file):
    function = FunctionReference("__main__", str(module_file), "Holder.method").resolve()
    assert function() == "__mp_main__"


def test_module_that_fails_to_import_is_removed_from_sys_modules(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("raise ValueError('broken')")
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            FunctionReference("broken_module", str(path), "anything").resolve()
    assert "broken_module" not in sys.modules


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (2, 3)])
def test_tensors_round_trip(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    loaded = loads(dumps({"inside": [tensor]}))["inside"][0]
    assert loaded.dtype == dtype and loaded.shape == shape
    assert torch.equal(loaded, tensor)
    loaded.zero_()  # writable, because it owns its memory


def test_views_are_stored_without_the_rest_of_their_storage():
    base = torch.arange(10_000.0).reshape(100, 100)
    message = dumps(base[:2, :3].t())
    assert len(message) < 1000
    assert loads(message).tolist() == [[0.0, 100.0], [1.0, 101.0], [2.0, 102.0]]


def test_parameters_and_requires_grad_are_preserved():
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    graph = torch.ones(2, requires_grad=True) * 2
    frozen_copy, graph_copy = loads(dumps((frozen, graph)))
    assert isinstance(frozen_copy, torch.nn.Parameter) and not frozen_copy.requires_grad
    assert graph_copy.requires_grad and graph_copy.is_leaf


def test_sparse_tensors_and_other_objects_use_plain_pickle():
    sparse = torch.eye(3).to_sparse()
    assert torch.equal(loads(dumps(sparse)).to_dense(), torch.eye(3))
    assert loads(dumps({"a": (1, "b")})) == {"a": (1, "b")}
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        dumps(lambda: None)


def test_pickled_tensors_do_not_import_megatron():
    assert b"megatron.core" not in dumps(torch.ones(1))
