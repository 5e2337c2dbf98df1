"""Choice of the engine, seeds and recorded library versions."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.generate.engine import choose_engine, derived_seed, library_versions


def install(monkeypatch: pytest.MonkeyPatch, *, vllm: bool, gpu: bool) -> None:
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    if vllm:
        monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)


@pytest.mark.parametrize(
    ("vllm", "gpu", "chosen"),
    [
        (False, False, "transformers"),
        (False, True, "transformers"),
        (True, False, "transformers"),
        (True, True, "vllm"),
    ],
)
def test_auto_is_vllm_if_installed_and_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, vllm: bool, gpu: bool, chosen: str
) -> None:
    install(monkeypatch, vllm=vllm, gpu=gpu)
    assert choose_engine("auto") == chosen
    assert choose_engine("transformers") == "transformers"


def test_vllm_must_be_installed_if_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"generate\.engine: is vllm, which is not installed"):
        choose_engine("vllm")


def test_seeds_are_distinct_and_stable_between_releases() -> None:
    seeds = {derived_seed(seed, index) for seed in range(20) for index in range(100)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**31 for seed in seeds)
    # A file that an older release started is continued with the same samples.
    assert derived_seed(0, 0) == 1136261819


def test_versions_of_the_libraries_that_influence_tokens() -> None:
    assert set(library_versions("transformers", has_adapter=False)) == {"torch", "transformers"}
    assert set(library_versions("transformers", has_adapter=True)) == {
        "torch",
        "transformers",
        "peft",
    }
