"""Hooks of the documentation site (mkdocs.yml): `make docs`.

Documents link to each other as on GitHub, by their paths in the repository. This adds the
documents outside docs/ to the site (`extra.pages`) and rewrites links: to the page of a document
that is on the site, otherwise to the file in the repository. A link to a file that does not exist
fails the build.
"""

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/megatron-idpo/megatron-idpo"

# A fenced block, inline code, or a link; what comes first hides the others.
_LINK = re.compile(
    r"(?P<code>^(?P<indent> *)(?P<fence>```+|~~~+).*?^(?P=indent)(?P=fence)[ \t]*$|`[^`\n]+`)"
    r"|\[(?P<text>[^\]]*)\]\((?P<path>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)",
    re.M | re.S,
)
_TITLE = re.compile(r"^# +(.*)$", re.M)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the documents outside docs/."""
    from mkdocs.structure.files import File

    for document, page in config.extra["pages"].items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / document)))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Rewrite the links of a page."""
    from mkdocs.exceptions import PluginError

    documents = {name: document for document, name in config.extra["pages"].items()}
    source = documents.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    try:
        return Document(source, config.extra["pages"]).rewritten(markdown)
    except FileNotFoundError as error:
        raise PluginError(f"{source}: link to {error}: no such file") from None


@dataclass(frozen=True, slots=True)
class Document:
    """A document of the repository that becomes a page."""

    path: str
    """In the repository."""

    pages: Mapping[str, str]
    """The pages of documents outside docs/."""

    def rewritten(self, markdown: str) -> str:
        """Its text with links between pages; raises FileNotFoundError for a broken one."""
        return _LINK.sub(self._rewrite, markdown)

    def _rewrite(self, match: re.Match[str]) -> str:
        path = match["path"]
        if match["code"] or not path or re.match(r"[a-z]+:", path):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(self.path), path))
        if not (ROOT / target).exists():
            raise FileNotFoundError(path)
        text = match["text"]
        # A text that is only the document's name becomes its title.
        if text.endswith(".md") and posixpath.basename(text) == posixpath.basename(target):
            title = _TITLE.search((ROOT / target).read_text(encoding="utf-8"))
            text = title[1] if title else text
        return f"[{text}]({self._link(target)}{match['anchor'] or ''})"

    def _link(self, target: str) -> str:
        page = self._page(target)
        if page is None:
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"{REPOSITORY}/{kind}/main/{target}"
        here = self._page(self.path)
        assert here is not None, self.path
        return posixpath.relpath(page, posixpath.dirname(here) or ".")

    def _page(self, document: str) -> str | None:
        if document.startswith("docs/") and not (ROOT / document).is_dir():
            return document.removeprefix("docs/")
        return self.pages.get(document)
