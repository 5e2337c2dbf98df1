"""Hub models: one process of each machine downloads, and only one for a shared cache."""

import json
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from megatron_idpo.errors import CheckpointError
from tests.train.fake_hub import COMMIT, running_hub

pytestmark = pytest.mark.distributed

NAME = "some/model"
URL = "{repo_id}/resolve/{revision}/{filename}"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickle"}
FILES |= {"README.md": b"card", "LICENSE": b"text", "USE_POLICY.md": b"policy"}


def fetch(
    endpoint: str, caches: list[str], names: list[str], *, is_tokenizer: bool = False
) -> list[str | None]:
    """What a rank gets; each cache is that of a machine with two ranks."""
    import torch.distributed as dist
    from huggingface_hub import constants

    from megatron_idpo.convert.hf_io.hub import fetch_models, fetch_tokenizer

    machine = dist.get_rank() // 2
    with (
        mock.patch.object(constants, "ENDPOINT", endpoint),
        mock.patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{URL}"),
        mock.patch.object(constants, "HF_HUB_CACHE", caches[machine]),
        mock.patch.object(constants, "HF_HUB_OFFLINE", False),
        mock.patch("socket.gethostname", lambda: f"machine-{machine}"),
    ):
        return [fetch_tokenizer(*names)] if is_tokenizer else [*fetch_models(names)]


@pytest.mark.parametrize(("caches", "downloads"), [(("a", "a"), 1), (("a", "b"), 2)])
def test_each_file_is_downloaded_once_per_cache(workers, tmp_path, caches, downloads):
    roots = [str(tmp_path / cache) for cache in caches]
    local = tmp_path / "local"
    local.mkdir()
    with running_hub() as hub:
        hub.files[NAME] = FILES
        ranks = workers.run(fetch, 4, hub.endpoint, roots, [NAME, str(local)])
        again = workers.run(fetch, 4, hub.endpoint, roots, [NAME])
        requests = Counter(hub.requests)
    for rank, (directory, other) in enumerate(ranks):
        assert directory.startswith(roots[rank // 2]) and directory.endswith(COMMIT)
        assert Path(directory, "model.safetensors").read_bytes() == b"weights"
        assert {path.name for path in Path(directory).iterdir()} == {*FILES} - {"pytorch_model.bin"}
        assert (other, again[rank]) == (str(local), [directory])
    assert requests[f"/{NAME}/resolve/{COMMIT}/model.safetensors"] == downloads
    # Of four processes, only the first asks which commit is the newest.
    assert requests[f"/api/models/{NAME}/revision/main"] == 2, json.dumps(requests)


def test_a_tokenizer_is_looked_up_once_per_machine_without_weights(workers, tmp_path):
    roots = [str(tmp_path / cache) for cache in "ab"]
    with running_hub() as hub:
        hub.files[NAME] = FILES
        ranks = workers.run(fetch, 4, hub.endpoint, roots, [NAME], is_tokenizer=True)
        requests = Counter(hub.requests)
    for rank, (directory,) in enumerate(ranks):
        assert directory.startswith(roots[rank // 2])
        assert [file.name for file in Path(directory).iterdir()] == ["config.json"]
    assert requests[f"/api/models/{NAME}/revision/main"] == 1
    assert requests[f"/{NAME}/resolve/{COMMIT}/config.json"] == 2


@pytest.mark.parametrize("path", [None, "some.model", "/no/such/directory"])
def test_what_is_no_hub_name_is_left_to_the_tokenizers_reader(path, workers, tmp_path):
    ranks = workers.run(fetch, 2, "", [str(tmp_path)] * 2, [path], is_tokenizer=True)
    assert ranks == [[path]] * 2


def test_missing_model_is_reported_by_all_ranks(workers, tmp_path):
    with running_hub() as hub, pytest.raises(CheckpointError, match="cannot be downloaded"):
        workers.run(fetch, 4, hub.endpoint, [str(tmp_path)] * 2, ["some/other"])
