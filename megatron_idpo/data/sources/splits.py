"""Which files of a directory or of a pattern are read: those of one split.

Splits are named as in `datasets`, so that a clone of a hub dataset has the splits of the dataset:
by `configs` in its `README.md`, else each file by its name as a shard
(`data/train_prefs-00000-of-00001.parquet`), else by the keywords of `datasets` (train, validation,
test, ...) in its directories' names and its own. `held_out` is one more keyword. Files that name
none are `train` if no file names `train`; otherwise they are not read, as in `datasets`.

Two rules are stricter: where files name several splits, one must be chosen, and a file that names
two is refused.
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

_NUMBERED = re.compile(r"(?P<name>.+)-(?P<at>\d{5})-of-(?P<count>\d{5})(?P<rest>[^/]*)")

_SHARD_DIRECTORY = "data"

_HELD_OUT = re.compile(r"(?<![a-z])(?:held|hold)[-_ ]?out(?![a-z])", re.I)
_HELD_OUT_SPLIT = "held_out"
"""Not a keyword of `datasets`, which leaves such files unread, or takes them for `train`."""

_LIKE_HELD_OUT = re.compile(
    r"(?<![a-z])(?:test|eval|valid|hold|held)(?!ated|ing)|(?<!la)(?<!con)(?<!pro)test(?![a-z])",
    re.I,
)
"""`mytest`, `testset`, `evals`: not keywords, but hardly training data."""

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
        # Files that are named exactly like the split, such as `train_prefs.jsonl`, unless their
        # directory names another.
        other = {name for split in splits if not wanted.startswith(split) for name in splits[split]}
        chosen = {name for name in names if Path(name).name.split(".")[0] == wanted} - other
    if not chosen:
        raise _no_split(source.path, wanted, splits)
    listed = chosen.union(*splits.values())
    if unread := [name for name in names if name not in listed]:
        count = format_count(len(unread), "file")
        logger.warning("%s: %s without a split are not read: %s, ...", root, count, unread[0])
    _warn_of_names(root, wanted, [name for name in names if name in chosen])
    return [file for name, file in names.items() if name in chosen]


def _warn_of_names(root: Path, split: str, names: Sequence[str]) -> None:
    """Warn of shards that are missing, and of training data with the name of held-out data."""
    like = [name for name in names if _LIKE_HELD_OUT.search(Path(name).name)]
    if split.startswith(DEFAULT_SPLIT) and like and len(like) < len(names):
        message = "%s: %s is trained as '%s'; if it is not meant, name the files in `path`"
        logger.warning(message, root, like[0], split)
    present: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        if shard := _NUMBERED.fullmatch(name):
            key = shard["name"], shard["count"], shard["rest"]
            present.setdefault(key, set()).add(int(shard["at"]))
    for (name, count, rest), found in present.items():
        if missing := sorted({*range(int(count))} - found):
            first = f"{name}-{missing[0]:05}-of-{count}{rest}"
            message = "%s: %d of %d shards are missing, the first is %s"
            logger.warning(message, root, len(missing), int(count), first)


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
    """Splits by the names of files; a file whose directory contradicts it is in both splits."""
    from datasets import data_files

    rules = [
        {str(split): {*_matching(names, globs)} for split, globs in patterns.items()}
        for patterns in (
            data_files.DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
            data_files.DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
        )
    ]
    splits: Splits = {}
    unnamed: list[str] = []
    for name in names:
        by_directory, by_file = (
            [split for split, files in rule.items() if name in files] for rule in rules
        )
        # Shards name splits of any name, `held_out` too: only directories can contradict them.
        shard = _shard_split(f"{root}/{name}")
        where = name if shard is None else Path(name).parent.as_posix()
        others = by_directory + ([_HELD_OUT_SPLIT] if _HELD_OUT.search(where) else [])
        if shard is None:
            found = list(dict.fromkeys(others + by_file))
        else:  # The directory `train` does not contradict the shard `train_prefs`.
            found = [shard, *(split for split in others if not shard.startswith(split))]
        for split in found:
            splits.setdefault(split, []).append(name)
        unnamed += [] if found else [name]
    if unnamed and not any(split.startswith(DEFAULT_SPLIT) for split in splits):
        splits[DEFAULT_SPLIT] = unnamed
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
