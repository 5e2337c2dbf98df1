"""The picture: a PNG whose lines are the run's, for short and long runs of few and many layers."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.figures.training_curves import draw_curves, layer_colours

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(path: Path, steps: int, layers: Sequence[int], evaluations: Sequence[int]) -> Path:
    """A run whose final layer learns fastest; before it begins all held-out pairs are tied."""
    random = np.random.default_rng(0)

    def quality(prefix: str, done: float, noise: float) -> dict[str, float]:
        values = {}
        for layer in (*layers, None):
            name = prefix if layer is None else f"{prefix}layer_{layer}/"
            margin = done * (1 if layer is None else layer / 40) * (1 + noise * random.normal())
            loss = "final_loss" if layer is None else "loss"
            values |= {
                f"{name}{loss}": float(np.log1p(np.exp(-margin))),
                f"{name}rewards/margins": margin,
                f"{name}rewards/accuracies": min(1.0, 0.5 * (done > 0) + 0.4 * done),
            }
        return values | {f"{prefix}loss": values[f"{prefix}final_loss"]}

    with path.open("w") as file:
        for step in range(steps + 1):
            values: dict[str, float] = {}
            if step:
                values = quality("", step / steps, 0.3)
                values |= {"grad_norm": 1 + random.random(), "learning_rate": 1e-4 * step / steps}
            if step in evaluations:
                values |= quality("eval_", step / steps, 0.0) | {"eval_pairs": 40}
            file.write(json.dumps({"step": step, **values}) + "\n")
    return path


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved; drawn small, because only their lines are looked at."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args, **kwargs) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs, dpi=30)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_what_is_drawn(tmp_path, drawn):
    metrics = write_run(tmp_path / "metrics.jsonl", 3, [15, 22], [0, 3])
    target = tmp_path / "new" / "curves.png"
    draw_curves(metrics, target, title="runs/night")
    assert target.read_bytes().startswith(PNG)
    (figure,) = drawn
    assert figure.get_suptitle() == "runs/night"
    losses, margins, accuracies, optimizer, rate = figure.axes
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss", "reward margin", "reward accuracy", "gradient norm", "learning rate"]
    # Per layer training and held-out pairs, the final layer last.
    assert [line.get_xdata().tolist() for line in losses.lines] == [[1, 2, 3], [0, 3]] * 3
    final_held_out = losses.lines[-1]
    assert final_held_out.get_color() == "black"
    assert final_held_out.get_ydata()[0] == pytest.approx(np.log(2))
    assert margins.lines[-2].get_ydata() == pytest.approx(  # zero is a line of the panel's own
        [0.0, 1.0]
    )
    message = [text.get_text() for text in accuracies.get_legend().get_texts()]
    assert message == ["held out, final layer, 95% interval of 40 pairs"]
    # Before training there is no accuracy on held-out pairs.
    assert accuracies.containers[0][0].get_xdata().tolist() == [3]
    assert [len(line.get_xdata()) for line in (*optimizer.lines, *rate.lines)] == [3, 3]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["training", "held-out pairs", "layer 15", "layer 22", "final layer"]


def test_plain_dpo_without_held_out_pairs(tmp_path, drawn):
    draw_curves(write_run(tmp_path / "m.jsonl", 40, [], []), tmp_path / "c.png")
    (figure,) = drawn
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["training, mean of 3 logged steps", "as logged"]
    assert figure.axes[2].get_legend() is None
    assert len(figure.axes[0].lines) == 1


@pytest.mark.parametrize(
    ("steps", "layers", "evaluations"),
    [
        (1, [], []),
        (1, [22], [0, 1]),
        (60, [4], [0, 30, 60]),
        (900, list(range(2, 26, 2)), list(range(0, 901, 5))),
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_run_can_be_drawn(tmp_path, drawn, steps, layers, evaluations):
    metrics = write_run(tmp_path / "m.jsonl", steps, layers, evaluations)
    draw_curves(metrics, tmp_path / "c.png")
    (figure,) = drawn
    assert all(len(line.get_xdata()) <= 800 for axes in figure.axes for line in axes.lines)
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {f"layer {layer}" for layer in layers} <= legend


@pytest.mark.filterwarnings("error")
def test_a_run_that_diverged_can_be_drawn(tmp_path, drawn):
    """Null is what the file has for NaN; and a norm a thousand times the others is not all."""
    lines = [{"step": step, "loss": 0.7, "grad_norm": 1.0} for step in range(1, 6)]
    lines += [{"step": 6, "loss": 9e9, "grad_norm": 1e5}, {"step": 7, "loss": None}]
    metrics = tmp_path / "m.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(metrics, tmp_path / "c.png")
    assert drawn[0].axes[3].get_yscale() == "log"


def test_one_bad_step_does_not_flatten_a_long_run(tmp_path, drawn):
    metrics = tmp_path / "m.jsonl"
    losses = [500.0 if step == 50 else 0.6 for step in range(200)]
    lines = [{"step": s, "loss": loss, "final_loss": 0.6} for s, loss in enumerate(losses, 1)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(metrics, tmp_path / "c.png")
    assert drawn[0].axes[0].get_ylim()[1] < 1.0


def test_layers_have_colours_of_their_own():
    layers = list(range(1, 31))
    assert len(set(layer_colours(layers).values())) == 30
    assert layer_colours([]) == {}
    assert list(layer_colours([22])) == [22]


def test_what_cannot_be_drawn_is_reported(tmp_path):
    empty = tmp_path / "metrics.jsonl"
    empty.touch()
    with pytest.raises(DataError, match=r"metrics\.jsonl: has no metrics to draw"):
        draw_curves(empty, tmp_path / "c.png")
    write_run(empty, 1, [], [])
    with pytest.raises(
        ConfigError, match=r"training\.output: cannot write .*metrics\.jsonl/c\.png"
    ):
        draw_curves(empty, empty / "c.png")
