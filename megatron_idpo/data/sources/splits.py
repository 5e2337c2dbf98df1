"""Which files of a directory or of a pattern are read: those of one split.

Splits are named as in `datasets`, so that a clone of a hub dataset has the splits of the dataset:
by `configs` in its `README.md`, else by names such as `data/train_prefs-00000-of-00001.parquet`,
else by the keywords of `datasets` (train, validation, test, ...) in directory names, else in file
names. Files that name none are `train`.

One rule is stricter: where files name several splits, one must be chosen.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.console.text import format_count
from megatron_idpo.errors import DataError

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = "train"
"""The split of files that name none, as in `datasets`."""

METADATA_FILES = {"state.json"}
"""JSON files of `datasets` that hold no rows, in addition to its `FILES_TO_IGNORE`."""

README = "README.md"

_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
"""`SPLIT_PATTERN_SHARDED` of `datasets`; a file name as `push_to_hub` writes it."""

_SHARD_DIRECTORY = "data"
_MAX_LISTED = 6

type Splits = dict[str, list[str]]
"""From the name of a split to its files, as names relative to the source."""


def is_data_name(name: str) -> bool:
    """Whether `datasets` would read a file of this relative name: not hidden, not its metadata."""
    from datasets.data_files import FILES_TO_IGNORE

    *directories, file = name.split("/")
    is_hidden = any(part.startswith(".") for part in (*directories, file))
    is_special = any(part.startswith("__") for part in directories)
    return not is_hidden and not is_special and file not in METADATA_FILES | {*FILES_TO_IGNORE}


def choose_files(source: SourceConfig, root: Path, files: Sequence[Path]) -> list[Path]:
    """The files of the chosen split, in order; of the only one if none is chosen.

    Args:
        source: with `split` and `subset`.
        root: the directory that the user named, or the common one of a pattern's files.
        files: data files below it.

    Raises:
        DataError: the files name several splits and none is chosen; or there is no such split or
            subset; or a chosen file belongs to two splits.
    """
    names = {file.relative_to(root).as_posix(): file for file in files}
    splits = _declared_splits(source, root, list(names))
    if splits is None:
        splits = _named_splits(root.name, list(names))
    wanted = source.split
    if wanted is None:
        if len(splits) > 1:
            message = f"its files name several splits: {_listed(splits)}"
            example = min(splits, key=lambda split: not split.startswith(DEFAULT_SPLIT))
            remedy = f"choose one, such as `split: {example}`, in one source per split"
            raise DataError.at(source.path, message, remedy)
        [wanted] = splits
    if wanted in splits:
        chosen = {*splits[wanted]}
        _check_apart(source, wanted, splits)
    else:
        # Files that are named exactly like the split, such as `train_prefs.jsonl`.
        chosen = {name for name in names if Path(name).name.split(".")[0] == wanted}
    if not chosen:
        raise _no_split(source.path, wanted, splits)
    listed = chosen.union(*splits.values())
    if unread := [name for name in names if name not in listed]:
        count = format_count(len(unread), "file")
        logger.warning("%s: %s without a split are not read: %s, ...", root, count, unread[0])
    return [file for name, file in names.items() if name in chosen]


def check_split(path: str, wanted: str | None, splits: Sequence[str]) -> str:
    """The split to read of a saved dataset: the chosen one, `train`, or the only one.

    Raises:
        DataError: there is no such split; or none is chosen, and none is `train`.
    """
    default = splits[0] if len(splits) == 1 else DEFAULT_SPLIT
    if (wanted or default) not in splits:
        known = ", ".join(splits)
        message = f"no split '{wanted or default}'; it has {known}"
        raise DataError.at(path, message, f"set `split` to one of {known}")
    return wanted or default


def _check_apart(source: SourceConfig, wanted: str, splits: Splits) -> None:
    """The wanted split shares no file with another.

    Raises:
        DataError: it does.
    """
    for other, files in splits.items():
        if other != wanted and (shared := sorted({*splits[wanted]} & {*files})):
            message = f"{shared[0]} names two splits, {wanted} and {other}"
            raise DataError.at(source.path, message, "rename it, or name the files in `path`")


def _no_split(path: str, wanted: str, splits: Splits) -> DataError:
    """The error for a split that no file names."""
    remedy = "correct `split`, or leave it out and name the files with a pattern in `path`"
    if "[" in wanted or "+" in wanted:
        message = f"'{wanted}' slices or joins splits, which works for hub datasets only"
        return DataError.at(path, message, remedy)
    return DataError.at(path, f"no split '{wanted}'; its files are {_listed(splits)}", remedy)


def _listed(splits: Splits) -> str:
    listed = [f"{split} ({files[0]})" for split, files in splits.items()]
    return ", ".join(listed[:_MAX_LISTED] + ["..."] * (len(listed) > _MAX_LISTED))


# ---- names ---------------------------------------------------------------------------------------


def _named_splits(root: str, names: Sequence[str]) -> Splits:
    """Splits by the names of files; those that name none are `train`."""
    from datasets import data_files

    splits: Splits = {}
    for name in names:
        if split := _shard_split(f"{root}/{name}"):
            splits.setdefault(split, []).append(name)
    for patterns in (
        data_files.DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
        data_files.DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    ):
        if splits:
            break
        matches = {str(split): _matching(names, globs) for split, globs in patterns.items()}
        splits = {split: files for split, files in matches.items() if files}
    listed = {name for files in splits.values() for name in files}
    if rest := [name for name in names if name not in listed]:
        splits.setdefault(DEFAULT_SPLIT, []).extend(rest)
    return splits


def _shard_split(name: str) -> str | None:
    """The split in the name of a shard.

    In a directory `data` every shard names one, as in `datasets`. Elsewhere only those do that
    begin with one of its keywords: the `pairs` of `pairs-00000-of-00002.jsonl` name none.
    """
    from datasets.data_files import SPLIT_KEYWORDS

    *directories, file = name.split("/")
    match = _SHARD.fullmatch(file)
    if match is None:
        return None
    split = match["split"]
    keywords = "|".join(word for words in SPLIT_KEYWORDS.values() for word in words)
    is_known = re.match(rf"(?:{keywords})(?![a-zA-Z])", split)
    return split if is_known or _SHARD_DIRECTORY in directories[-1:] else None


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that one of the patterns matches, in any case, by the rules of `datasets`."""
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]  # of `datasets`

    regex = re.compile("|".join(f"(?:{glob_translate(pattern)})" for pattern in patterns), re.I)
    return [name for name in names if regex.match(name)]


# ---- README.md -----------------------------------------------------------------------------------


def _declared_splits(source: SourceConfig, root: Path, names: Sequence[str]) -> Splits | None:
    """Splits of the subset by `configs` in the README; None if it declares none of the files.

    Raises:
        DataError: there is no such subset, or several and none is chosen; the README is invalid.
    """
    from datasets.data_files import sanitize_patterns

    path = root / README
    configs = _configs(path) if path.is_file() else {}
    subset = source.subset
    if subset is not None and subset not in configs:
        known = f"{README} declares {', '.join(configs)}" if configs else f"no {README} declares it"
        remedy = "name the directory of its files in `path`, and leave `subset` out"
        raise DataError.at(source.path, f"no subset '{subset}': {known}", remedy)
    if not configs:
        return None
    if subset is None:
        subset = _default_subset(configs)
    if subset is None:
        message = f"{README} declares several subsets: {', '.join(configs)}"
        remedy = f"choose one, such as `subset: {next(iter(configs))}`"
        raise DataError.at(source.path, message, remedy)
    config = configs[subset]
    prefix = f"{config['data_dir'].strip('./')}/" if config.get("data_dir") else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if config.get("data_files") is None:
        splits = _named_splits(Path(prefix).name or root.name, inside)
    else:
        patterns = sanitize_patterns(config["data_files"])
        splits = {
            split: _matching(inside, [pattern.removeprefix("./") for pattern in globs])
            for split, globs in patterns.items()
        }
    present = {split: [prefix + name for name in files] for split, files in splits.items() if files}
    return present or None


def _default_subset(configs: Mapping[str, Any]) -> str | None:
    """The subset that `datasets` loads if none is named."""
    default = [
        name
        for name, config in configs.items()
        if len(configs) == 1 or name == "default" or config.get("default")
    ]
    return default[0] if len(default) == 1 else None


def _configs(readme: Path) -> dict[str, dict[str, Any]]:
    """The subsets that the front matter of a dataset's README declares.

    Raises:
        DataError: it is not valid, so that splits and subsets are unknown.
    """
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import metadata_load

    fields = ("config_name", "data_files", "data_dir", "default")
    try:
        text = readme.read_text("utf-8", errors="replace")
        if "configs:" not in text or not text.lstrip("\ufeff").startswith("---"):
            return {}
        configs = (metadata_load(readme) or {}).get("configs") or []
        # `features` and options of readers are not needed.
        kept = [{name: config[name] for name in fields if name in config} for config in configs]
        return dict(MetadataConfigs.from_dataset_card_data({"configs": kept}))
    # YAML, its types, and the checks of `datasets` raise almost any type.
    except Exception as error:
        message = f"`configs` cannot be read: {type(error).__name__}: {error}"
        remedy = "correct it, or name the files with a pattern in `path`"
        raise DataError.at(str(readme), " ".join(message.split()), remedy) from error
