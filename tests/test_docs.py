"""Documents are valid: links, commands, make targets, configurations; their Python compiles.

Commands are parsed by the program's own parser and not run.
"""

import ast
import importlib
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_idpo.cli import main as cli
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS
from megatron_idpo.errors import ConfigError

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/**/*.md")),
        *sorted(ROOT.glob("launch/*.md")),
    )
    if path.exists()
]
FENCE = re.compile(r"^( *)(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)^\1\2[ \t]*$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^ *\[[^\]]+\]: *(\S+)", re.M)
INLINE_CODE = re.compile(r"`[^`\n]+`")
HEADING = re.compile(r"^#+ +(.*?) *#*$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its text."""

    language: str
    text: str


def blocks(document: str) -> list[Block]:
    return [
        Block(match[3].lower(), textwrap.dedent(match[4])) for match in FENCE.finditer(document)
    ]


def links(document: str) -> list[str]:
    prose = INLINE_CODE.sub("", FENCE.sub("", document))
    return [match[1] or match[2] for match in LINK.finditer(prose)]


def anchors(document: str) -> set[str]:
    """GitHub's names for the headings."""
    headings = (match[1].lower() for match in HEADING.finditer(FENCE.sub("", document)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def commands(block: Block) -> Iterator[list[str]]:
    """Each shell command of a block as a list, without prompts, comments and environment."""
    if block.language not in {"", "sh", "bash", "shell", "console", "text"}:
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        for command in re.split(r"&&|\|\||[;|]", line):
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # an apostrophe in printed output
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def program_arguments(words: list[str]) -> list[str] | None:
    """The arguments of megatron-idpo, started by name, by `python -m` or by torchrun."""
    if words[0] == "megatron-idpo":
        rest = words[1:]
    elif "megatron_idpo" in words[:-1] and words[words.index("megatron_idpo") - 1] == "-m":
        rest = words[words.index("megatron_idpo") + 1 :]
    else:
        return None
    redirections = [
        location for location, word in enumerate(rest) if re.match(r"\d?[<>]|&$|→", word)
    ]
    return rest[: redirections[0]] if redirections else rest


def problem_of_command(words: list[str]) -> str | None:
    arguments = program_arguments(words)
    # VERB is a placeholder, and `...` stands for earlier arguments.
    if not arguments or "VERB" in arguments or "..." in arguments:
        return None
    try:
        cli.build_parser().parse_args(arguments)
    except ConfigError as error:
        return f"{' '.join(words)}: {error}"
    except SystemExit as end:  # --help and --version
        return None if not end.code else f"{' '.join(words)}: exit {end.code}"
    return None


def missing_imports(tree: ast.Module) -> Iterator[str]:
    """Names of this package that a Python block imports and that do not exist."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_idpo"):
            try:
                module = importlib.import_module(node.module or "")
            except ModuleNotFoundError as error:
                yield f"python block: {error}"
                continue
            for alias in node.names:
                if not hasattr(module, alias.name):
                    yield f"python block: {node.module} has no {alias.name}"


def problems(path: Path, targets: set[str]) -> Iterator[str]:
    document = path.read_text(encoding="utf-8")
    for link in links(document):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        if not target.exists():
            yield f"link to {link}: no such file"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
            yield f"link to {link}: no such heading"
    for block in blocks(document):
        if block.language in {"python", "py"}:
            try:
                tree = ast.parse(block.text, str(path))
            except SyntaxError as error:
                yield f"python block: {error}"
            else:
                yield from missing_imports(tree)
        for words in commands(block):
            if problem := problem_of_command(words):
                yield problem
            if words[0] == "make":
                for word in words[1:]:
                    if not word.startswith("-") and "=" not in word and word not in targets:
                        yield f"make {word}: no such target"
    for target in re.findall(r"`make ([a-z][\w-]*)`", document):
        if target not in targets:
            yield f"make {target}: no such target"


@pytest.fixture(scope="module")
def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_document_is_valid(
    path: Path, targets: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    reported = list(problems(path, targets))
    assert not reported, "\n".join(reported)


def test_main_documents_exist() -> None:
    assert {"README.md", "CONTRIBUTING.md"} <= {path.name for path in DOCUMENTS}


def test_every_make_target_has_help(targets: set[str]) -> None:
    described = set(re.findall(r"^([a-z][\w-]*):.*## ", (ROOT / "Makefile").read_text(), re.M))
    assert described == targets


INVALID = [
    ("[a](missing.md)", "no such file"),
    ("![a](pictures/missing.png)", "no such file"),
    ("[a]: missing.md", "no such file"),
    ("# One heading\n[a](#another)", "no such heading"),
    ("```bash\nmegatron-idpo covnert a b\n```", "covnert"),
    ("```bash\nmegatron-idpo convert hf-to-megatron a\n```", "required: OUTPUT"),
    ("```\n$ X=1 megatron-idpo convert hf-to-megatron a b \\\n   --form bf16\n```", "--form"),
    ("```sh\ntorchrun --nproc-per-node 2 -m megatron_idpo conver a b\n```", "conver"),
    ("```sh\ncd x && make tset\n```", "no such target"),
    ("Run `make tset`.", "no such target"),
    ("```python\nif x\n```", "python block"),
    ("```python\nfrom megatron_idpo.errors import Nothing\n```", "has no Nothing"),
    ("```python\nfrom megatron_idpo.nothing import x\n```", "No module named"),
]


@pytest.mark.parametrize(("text", "message"), INVALID)
def test_invalid_document_is_reported(
    tmp_path: Path, targets: set[str], text: str, message: str
) -> None:
    path = tmp_path / "a.md"
    path.write_text(f"{text}\n")
    (problem,) = problems(path, targets)
    assert message in problem


VALID = """
# A heading, `coded` here

[here](#a-heading-coded-here) [web](https://example.com/x) [mail](mailto:a@b.c) `[no](link)`
Run `make test`.

```bash
make test ARGS="tests/mcore -x"     # it's a comment
megatron-idpo VERB CONFIG.yaml
megatron-idpo convert hf-to-megatron IN OUT --dtype bf16 > log.txt
torchrun --nproc-per-node 2 -m megatron_idpo convert megatron-to-hf IN OUT --tensor 2
megatron-idpo doctor run.yaml layout.tensor=2
megatron-idpo --help | head
```

```console
$ megatron-idpo doctor
it's printed output
```

  ```python
  x = 1
  ```

```yaml
[not](a link)
```
"""


def test_valid_document_has_no_problems(
    tmp_path: Path, targets: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.md"
    path.write_text(VALID)
    assert list(problems(path, targets)) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_placeholder_is_left(path: Path) -> None:
    assert not re.findall(r"@[A-Z_]+@", path.read_text())


def configurations(path: Path) -> list[str]:
    """The YAML blocks of a document that are complete configurations."""
    texts = [block.text for block in blocks(path.read_text()) if block.language == "yaml"]
    return [text for text in texts if re.search("^model:", text, re.M)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configurations_in_documents_are_valid(path: Path, tmp_path: Path) -> None:
    for text in configurations(path):
        (tmp_path / "run.yaml").write_text(text)
        load_config(tmp_path / "run.yaml", optional=SECTIONS)


def test_fragments_of_the_section_sdpo_are_valid(tmp_path: Path) -> None:
    """The table of ways to distribute pairs, and the fragment with options of a step."""
    path = ROOT / "docs/sdpo.md"
    document = path.read_text()
    rows = re.findall(r"^\|[^|]+\|([^|]+steps: [^|]+)\|", document, re.M)
    sections = [f"sdpo: {{{row.replace('`', '')}}}" for row in rows]
    sections += [b.text for b in blocks(document) if b.text.startswith("sdpo:")]
    assert len(sections) == 7
    [whole] = configurations(path)
    others = whole.replace("[easy.jsonl, hard.jsonl]", "[a.jsonl, b.jsonl, c.jsonl]")
    others = re.sub("^sdpo: .*\n", "", others, flags=re.M)
    assert "c.jsonl" in others and "sdpo:" not in others
    for section in sections[:-1]:
        (tmp_path / "run.yaml").write_text(f"{others}{section}\n")
        assert load_config(tmp_path / "run.yaml", optional=SECTIONS).sdpo is not None
    (tmp_path / "run.yaml").write_text(others.replace(", c.jsonl", "") + sections[-1])
    load_config(tmp_path / "run.yaml", optional=SECTIONS)
