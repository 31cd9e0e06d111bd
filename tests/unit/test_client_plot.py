"""What `clients.png` shows, read from the figure before it is saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpc.report import client_plot
from hpc.report.plots import plot_all, plot_time
from hpc.report.summary import summarise
from tests.unit import report_case as case

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def made_up(clients: int, steps: int = 20, *, evaluations: tuple[int, ...] = (0, 20), every: int = 1) -> dict[str, Any]:
    """A summary whose client k takes part in every `every`-th step, from step 1 + k % `every`, with loss k."""
    names = [f"client-{k}" for k in range(clients)]
    history = [[step, 0.5] for step in evaluations]
    return {
        **summarise(case.config(clients=clients), {}),
        "losses": [1.0] * steps,
        "losses_by_client": {
            name: [[step, float(k)] for step in range(1 + k % every, steps + 1, every)] for k, name in enumerate(names)
        },
        "eval": {
            **summarise(case.config(), {})["eval"],
            "history": history,
            "loss_history": history,
            "per_client": {name: {"history": history, "loss_history": history} for name in names},
        },
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, as they are about to be saved."""
    kept: list[Figure] = []
    save = client_plot.save
    monkeypatch.setattr(client_plot, "save", lambda figure, path: kept.append(figure) or save(figure, path))
    return kept


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("clients", [2, 8])
def test_each_of_few_clients_has_a_colour_and_a_name(clients: int, drawn: list[Figure], tmp_path: Path) -> None:
    client_plot.plot_clients(made_up(clients), tmp_path / "clients.png")
    training, accuracy, loss = drawn[0].axes
    assert len({line.get_color() for line in training.lines}) == len(training.lines) == clients
    assert len(accuracy.lines) == len(loss.lines) == clients + 1
    assert legend(drawn[0]) == [*(f"client-{k}" for k in range(clients)), "all clients"]
    assert max(line.get_ydata()[0] for line in accuracy.lines) == 50.0  # type: ignore[index]
    assert (tmp_path / "clients.png").stat().st_size > 10_000


def test_many_clients_are_grey_with_their_median_and_the_band_of_most(drawn: list[Figure], tmp_path: Path) -> None:
    client_plot.plot_clients(made_up(64), tmp_path / "clients.png")
    training = drawn[0].axes[0]
    assert len({line.get_color() for line in training.lines[:64]}) == 1
    assert list(training.lines[64].get_ydata()) == [31.5] * 20
    band = training.collections[0].get_paths()[0].vertices
    assert (min(band[:, 1]), max(band[:, 1])) == pytest.approx((6.3, 56.7))  # type: ignore[call-overload,index]
    assert legend(drawn[0]) == ["one client", "8 of 10 clients", "median client", "all clients"]


def test_panels_without_two_evaluations_are_left_out(drawn: list[Figure], tmp_path: Path) -> None:
    for evaluations, panels in (((), 1), ((0,), 1), ((0, 20), 3)):
        client_plot.plot_clients(made_up(2, evaluations=evaluations), tmp_path / "clients.png")
        assert len(drawn[-1].axes) == panels
    unknown = made_up(2)
    unknown["eval"]["loss_history"] = []
    for found in unknown["eval"]["per_client"].values():
        found["loss_history"] = [[0, math.nan], [20, math.nan]]
    client_plot.plot_clients(unknown, tmp_path / "clients.png")
    assert [axis.get_ylabel()[:8] for axis in drawn[-1].axes] == ["training", "held-out"]


def test_a_client_without_held_out_examples_has_no_line_among_many(drawn: list[Figure], tmp_path: Path) -> None:
    summary = made_up(12)
    summary["eval"]["per_client"]["client-3"] = {"history": [], "loss_history": []}
    client_plot.plot_clients(summary, tmp_path / "clients.png")
    assert [len(axis.lines) for axis in drawn[0].axes] == [13, 12, 12]


def test_steps_a_client_sat_out_are_not_drawn_as_its_own(drawn: list[Figure], tmp_path: Path) -> None:
    client_plot.plot_clients(made_up(4, every=4), tmp_path / "clients.png")
    lines = drawn[0].axes[0].lines
    assert [list(line.get_xdata())[:2] for line in lines] == [[1, 5], [2, 6], [3, 7], [4, 8]]
    assert all(line.get_marker() == "." for line in lines)


def test_after_a_pause_old_losses_do_not_count() -> None:
    assert client_plot.recent_means([1, 2, 3, 20], [5.0, 3.0, 1.0, 0.5], window=2) == [5.0, 4.0, 2.0, 0.5]


def test_many_clients_of_a_cohort_stay_where_they_were_last_seen() -> None:
    curves = {"a": ([1.0, 3.0], [1.0, 3.0]), "b": ([2.0], [8.0])}
    assert client_plot._percentile(curves, 50) == ([1.0, 2.0, 3.0], [1.0, 5.0, 5.5])


def test_it_needs_two_clients_whose_losses_are_here(tmp_path: Path) -> None:
    def names(summary: dict[str, Any]) -> list[str]:
        return [path.name for path in plot_all(summary, tmp_path)]

    assert "clients.png" in names(made_up(2))
    one = made_up(2)
    one["losses_by_client"]["client-1"] = [[1, math.nan]]
    assert "clients.png" not in names(one)


def test_of_many_clients_three_have_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr("hpc.report.plots.save", lambda figure, path: kept.append(figure) or path)
    seconds = {
        f"client-{k}": {"head": (k * 7 % 20) / 10, "wait": 5.0, "total": 5.0 + (k * 7 % 20) / 10} for k in range(20)
    }
    summary = {**made_up(20), "seconds_per_step_by_role": {"trunk-0": {"trunk": 1.0, "total": 1.0}, **seconds}}
    plot_time(summary, tmp_path / "time.png")
    bars = [label.get_text().split("\n")[0] for label in kept[0].axes[0].get_yticklabels()]
    assert bars == ["trunk-0", "client-0", "client-7", "client-17"]
