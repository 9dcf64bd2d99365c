from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection

from harness.report.build import figures, report
from harness.report.curves import against_length
from harness.report.density import density_map
from harness.report.maps import (
    dropped_at,
    kept_image,
    kept_spans,
    needle_kept,
    needle_map,
    shares_near_needle,
    survival,
)
from harness.report.plots import Point, style_of, with_interval
from harness.report.recorded import read
from tests.report.test_report import record, write
from tests.report.test_tables import needle_records, written

pytestmark = pytest.mark.slow

DRAW = "import sys; from harness.report.build import report; report(sys.argv[1:2], sys.argv[2])"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("runs") / "main", needle_records(4))


def test_every_plot_as_png_and_svg(run: Path, tmp_path: Path) -> None:
    paths = [path for path in report([run], tmp_path) if path.suffix in (".png", ".svg")]
    names = {"accuracy_ttft", "length", "parts", "needles", "survival", "survivors"}
    assert {path.stem for path in paths} == names and len(paths) == 2 * len(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths if path.suffix == ".png")


@pytest.mark.cluster
def test_another_process_draws_the_same_bytes_in_every_file(run: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    command = [sys.executable, "-c", DRAW, str(run.parent), str(there)]
    # Sets of strings come in another order there.
    with subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": "1"}) as process:
        files = [path.relative_to(here) for path in report([run.parent], here)]
    assert process.returncode == 0
    assert {file.suffix for file in files} == {".png", ".svg", ".html", ".md", ".csv", ".tex"}
    assert not [file for file in files if (here / file).read_bytes() != (there / file).read_bytes()]


def test_needles_of_suites_are_not_mixed(tmp_path: Path) -> None:
    """The same lengths and depths in two suites, one found and one not: no mean of the two is drawn."""
    found = needle_records(1)
    found = [one for one in found if one.method == "full"]
    lost = [
        one.model_copy(update={"task": "retrieval/multikey:lengths=1024", "score": 0.0, "cell": "m"}) for one in found
    ]
    run = read(written(tmp_path / "run", [*found, *lost]))
    figure = needle_map(run)
    assert figure is not None
    blocks = {place.get_suptitle(): place for place in figure.subfigs}
    assert list(blocks) == ["needle: needles found, %", "retrieval/multikey: needles found, %"]
    shown = [{text.get_text() for axes in place.axes for text in axes.texts} for place in blocks.values()]
    assert shown == [{"100"}, {"0"}]


def test_what_was_not_recorded_is_not_drawn(tmp_path: Path) -> None:
    plain = read(write(tmp_path / "run", [record("full", "needle", 0, score=None, ttft_s=None)]))
    assert [name for name, _ in figures(plain)] == []
    assert against_length(plain) is None


spans = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda one: (one[0], one[0] + one[1])), max_size=4
)


@given(spans, st.integers(1, 60), st.integers(1, 80))
def test_survival_counts_what_was_kept(layer: list[tuple[int, int]], tokens: int, bins: int) -> None:
    clipped = [(start, min(end, tokens)) for start, end in layer]
    image = survival([clipped], tokens, bins)
    kept = {position for start, end in clipped for position in range(start, end)}
    sizes = np.diff(np.linspace(0, tokens, min(bins, tokens) + 1).round().astype(int))
    assert image.shape == (1, min(bins, tokens)) and float((image * sizes).sum()) == pytest.approx(len(kept))


def test_where_a_needle_was_dropped() -> None:
    extra = {"needles": [[5, 8]], "kept_spans": [[[0, 10]], [[0, 6], [7, 10]], []]}
    assert dropped_at(extra) == (1, 2, 3)
    assert dropped_at(extra | {"kept_spans": [[[0, 6], [6, 10]]]}) is None
    assert dropped_at({"needles": [[5, 8]]}) is None and kept_spans({}) is None
    assert kept_spans({"kept_spans": [[[3, 4]], None]}) == [[(3, 4)], [(3, 4)]]
    assert needle_kept([(0, 3), (4, 9)], (2, 5)) == 2


def test_a_map_is_drawn_from_shares_where_spans_are_missing() -> None:
    extra = {"needles": [[5, 8], [0, 1]], "kept_spans": None, "kept_shares": [[1.0, 0.5, 0.2, 0.0], None]}
    image = kept_image(extra, 12)
    assert image is not None and image.tolist() == [[1.0, 0.5, 0.2, 0.0]] * 2
    assert shares_near_needle(extra, 12) == [0.2, 0.2]
    assert kept_image({"kept_spans": None}, 12) is None


def test_a_map_of_density_shows_the_longest_prompts(tmp_path: Path) -> None:
    pairs = ((256, [[1.0, 1.0]]), (512, [[0.25, 0.5]]), (512, [[0.75, 0.5]]))
    records = [
        record("ashape", "needle", number, prompt_tokens=length, extra={"length": length, "density": layers})
        for number, (length, layers) in enumerate(pairs)
    ]
    figure = density_map(read(written(tmp_path / "run", [*records, record("full", "needle", 0)])))
    assert figure is not None
    (image,) = figure.axes[0].images
    assert np.asarray(image.get_array()).tolist() == [[0.5, 0.5]]
    assert figure.axes[0].get_title() == "ashape\nmean 50%" and "512 tokens" in figure.get_suptitle()
    assert density_map(read(written(tmp_path / "plain", [record("full", "needle", 0)]))) is None


def test_intervals_of_a_point_are_those_of_the_paired_effect() -> None:
    effect = {"ttft_ratio": 2.0, "ttft_low": 1.6, "ttft_high": 2.5, "score_difference": -5.0, "score_low": -9.0}
    point = with_interval(Point(1.0, 80.0, "slim"), effect | {"score_high": -2.0})
    assert point.xs == pytest.approx((0.8, 1.25)) and point.ys == pytest.approx((76.0, 83.0))
    assert all(map(math.isnan, with_interval(Point(1.0, 80.0, "full"), {}).xs))


def many_methods(folder: Path, count: int) -> Path:
    """Two groups of methods that kept alike, all of the same score and nearly the same time."""
    methods = ["full", *(f"slim:w={number}" for number in range(1, count))]
    kept = {method: [100, 50 if index % 2 else 25] for index, method in enumerate(methods)} | {"full": [100, 100]}
    records = [
        record(method, "needle", n, ttft_s=1 + n + index / 100, tokens_kept=kept[method], tokens_requested=kept[method])
        for n in range(8)
        for index, method in enumerate(methods)
    ]
    return written(folder, records)


@pytest.mark.parametrize(("count", "crowded"), [(6, False), (7, True), (12, True)])
def test_many_methods_get_a_legend_instead_of_labels(tmp_path: Path, count: int, crowded: bool) -> None:
    figure = dict(figures(read(many_methods(tmp_path / "run", count))))["accuracy_ttft"]
    names = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert len(figure.axes[0].texts) == (0 if crowded else count)
    assert len(names) == (count if crowded else 0) and not any("\n" in name for name in names)
    assert not crowded or names[:2] == ["full", "slim w=1 1.00x"]


def test_no_two_of_many_methods_look_alike() -> None:
    assert len({style_of(index) for index in range(49)}) == 49


def test_scores_and_their_intervals_stay_between_0_and_100(tmp_path: Path) -> None:
    axes = dict(figures(read(many_methods(tmp_path / "run", 12))))["accuracy_ttft"].axes[0]
    segments = [ends for bars in axes.collections if isinstance(bars, LineCollection) for ends in bars.get_segments()]
    assert segments and all(0 <= y <= 100 for ends in segments for _, y in ends)
    assert all(0 <= tick <= 100 for tick in axes.get_yticks())


def test_methods_that_kept_alike_share_a_line(tmp_path: Path) -> None:
    axes = dict(figures(read(many_methods(tmp_path / "run", 8))))["survivors"].axes[0]
    labels = [label.replace(",\n", ", ") for label in axes.get_legend_handles_labels()[1]]
    assert labels == ["slim w=1, slim w=3, slim w=5, slim w=7", "slim w=2, slim w=4, slim w=6"]
