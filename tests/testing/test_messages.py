"""How a worker finds the function it is to call; `test_pool.py` sends the messages."""

import sys

import pytest

from megatron_idpo.testing.messages import FunctionReference

SOURCE = """
class Holder:
    @staticmethod
    def method():
        return __name__

if __name__ == "__main__":
    raise SystemExit("the script's own part must not run")
"""


@pytest.fixture
def module_file(tmp_path):
    before = {*sys.modules}
    path = tmp_path / "somewhere.py"
    path.write_text(SOURCE)
    yield path
    for name in {*sys.modules} - before:
        del sys.modules[name]


def test_a_function_is_found_by_path_and_its_module_loaded_once(module_file):
    reference = FunctionReference("not.on.the.path", str(module_file), "Holder.method")
    function = reference.resolve()
    assert function() == "not.on.the.path"
    assert reference.resolve() is function


def test_a_function_is_found_by_name_where_the_name_leads_to_its_file():
    import megatron_idpo.errors as errors

    reference = FunctionReference("megatron_idpo.errors", errors.__file__, "ConfigError.at")
    assert reference.resolve() == errors.ConfigError.at


def test_the_path_decides_if_the_name_leads_elsewhere(module_file, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    function = FunctionReference("colorsys", str(module_file), "Holder.method").resolve()
    assert function() == "colorsys"


def test_a_script_is_loaded_without_its_main_part(module_file):
    function = FunctionReference("__main__", str(module_file), "Holder.method").resolve()
    assert function() == "__mp_main__"


def test_a_module_that_fails_to_load_is_not_kept(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("raise ValueError('broken')")
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            FunctionReference("broken_module", str(path), "anything").resolve()
    assert "broken_module" not in sys.modules
