"""A fixture for packages that look installed."""

from pathlib import Path

import pytest


def fake_module(directory: Path, name: str, text: str, version: str) -> None:
    """An importable package with metadata, as pip would leave it."""
    (directory / name).mkdir()
    (directory / name / "__init__.py").write_text(text)
    metadata = directory / f"{name}-{version}.dist-info"
    metadata.mkdir()
    distribution = name.replace("_", "-")
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )


@pytest.fixture(name="fake_module")
def the_fake_module():
    return fake_module
