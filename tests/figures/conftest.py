"""Access to the figures that are saved."""

from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def saved_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The saved figures, at a low resolution, because tests look at their contents only."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs, dpi=30)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures
