"""The documentation site lists every document once; links lead to pages or to the repository.

`make docs` itself checks every link and anchor of the site; the workflow in .github/ runs it.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from docs_site import REPOSITORY, ROOT, Document

import megatron_idpo

API = ROOT / "docs/api.md"
PAGES = {"README.md": "index.md", "launch/README.md": "launch.md"}


class ConfigLoader(yaml.SafeLoader):
    """Reads mkdocs.yml without importing the functions that it names."""


ConfigLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def listed(nav: Any) -> Iterator[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from listed(item)


def rewritten(source: str, markdown: str) -> str:
    return Document(source, PAGES).rewritten(markdown)


def test_navigation_lists_every_document_once() -> None:
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), ConfigLoader)
    documents = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed(site["nav"])) == sorted([*documents, *site["extra"]["pages"].values()])
    assert all((ROOT / document).is_file() for document in site["extra"]["pages"])


def test_nothing_is_loaded_from_other_hosts() -> None:
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), ConfigLoader)
    assert site["theme"]["font"] is False
    assert not any("//" in name for name in [*site["extra_css"], *site.get("extra_javascript", ())])


def test_reference_has_every_public_name() -> None:
    documented = set(re.findall(r"^::: megatron_idpo\..*?(\w+)$", API.read_text(), re.M))
    assert set(megatron_idpo.__all__) <= documented


@pytest.mark.parametrize(
    ("source", "link", "page"),
    [
        ("docs/training.md", "data.md#formats", "data.md#formats"),
        ("docs/training.md", "../launch/README.md#slurm", "launch.md#slurm"),
        ("docs/training.md", "../README.md", "index.md"),
        ("README.md", "docs/training.md", "training.md"),
        ("launch/README.md", "../docs/faults.md", "faults.md"),
        ("docs/training.md", "../launch/node.py", f"{REPOSITORY}/blob/main/launch/node.py"),
        ("README.md", "examples", f"{REPOSITORY}/tree/main/examples"),
        ("README.md", "https://example.com/a.md", "https://example.com/a.md"),
        ("README.md", "#install", "#install"),
    ],
)
def test_links_lead_to_pages_or_to_the_repository(source: str, link: str, page: str) -> None:
    assert rewritten(source, f"see [here]({link}).") == f"see [here]({page})."


def test_name_of_a_document_becomes_its_title() -> None:
    assert rewritten("README.md", "[docs/losses.md](docs/losses.md)") == "[Losses](losses.md)"


def test_code_is_not_rewritten() -> None:
    code = "`[a](missing.md)`\n\n```text\n[a](missing.md)\n```\n"
    assert rewritten("README.md", code) == code


def test_link_to_a_missing_file_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.md"):
        rewritten("README.md", "[a](missing.md)")
