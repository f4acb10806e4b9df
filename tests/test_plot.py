import csv
import json

import numpy as np
import pytest
from matplotlib.image import imread

import plot
from runs import ROOT, no_room


def write_metrics(folder, offset=0.0, rows=20):
    folder.mkdir()
    keys = ["rollout/return_mean", "rollout/landed_rate", "update/clip_fraction", "update/approx_kl", "update/entropy",
            "update/explained_variance", "eval/return_mean", "speed/total_seconds"]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["frames", *keys])
        for i in range(rows):
            evaluated = "nan" if i % 5 else 10.0 * i
            returns = 10 * i + offset
            writer.writerow([1000 * (i + 1), returns, i / rows, 0.15, 0.02, 1.0, 0.5, evaluated, 60.0 * (i + 1)])
    return folder


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are about to be saved."""
    drawn, save = [], plot.save_figure
    monkeypatch.setattr(plot, "save_figure", lambda figure, output: (drawn.append(figure), save(figure, output)))
    return drawn


def test_a_run_is_drawn_with_its_bands(tmp_path, figures):
    plot.main([str(write_metrics(tmp_path / "a"))])
    assert imread(tmp_path / "a" / "curves.png").shape[:2] == (650, 1300)
    axes = {axis.get_title(): axis for axis in figures[0].axes}
    training, scored, _ = axes["return"].lines
    np.testing.assert_allclose(training.get_ydata(), 10 * np.arange(20))
    np.testing.assert_allclose(training.get_xdata(), np.arange(1, 21) / 1000)
    np.testing.assert_allclose(scored.get_ydata(), [0, 50, 100, 150])
    bands = {"clip fraction": (0.1, 0.2), "KL divergence from the collecting policy": (0, 0.3)}
    for title, (low, high) in bands.items():
        band = axes[title].patches[0]
        assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((low, high))


def test_seeds_are_a_mean_and_a_band_over_frames_and_over_minutes(tmp_path, figures):
    a, b = write_metrics(tmp_path / "a"), write_metrics(tmp_path / "b", offset=20.0)
    plot.main([f"both={a},{b}", f"one={a}", "--output", str(tmp_path / "compare.png")])
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    for axis in figures[0].axes:
        both, one, _ = axis.lines
        np.testing.assert_allclose(both.get_ydata() - one.get_ydata(), 10, atol=1e-6)
        (band,) = axis.collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((0, 210))
    frames, minutes = figures[0].axes
    assert frames.lines[0].get_xdata()[-1] == pytest.approx(0.02)
    assert minutes.lines[0].get_xdata()[-1] == pytest.approx(20)
    assert [text.get_text() for text in frames.get_legend().get_texts()] == ["both, 2 seeds", "one, 1 seed"]


@pytest.mark.parametrize("end", ["21000,3", "21000,200,1,0.15,0.02,1,0.5,nan,12"])  # of 1260.0
def test_a_row_cut_off_by_a_crash_is_left_out(end, tmp_path):
    run = write_metrics(tmp_path / "a")
    with open(run / "metrics.csv", "a") as file:
        file.write(end)
    assert len(plot.read_metrics(run)["frames"]) == 20


def test_a_label_may_begin_with_an_underscore(tmp_path, figures):
    run = write_metrics(tmp_path / "_a")
    plot.main([str(run), f"b={run}", "--output", str(tmp_path / "compare.png")])
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["_a, 1 seed", "b, 1 seed"]


@pytest.mark.parametrize("content", [
    None, b"", b"frames,x\n", b"frames,x\n1,words\n", b"frames,x\n1,2\n\n", b"frames,x\n\xff,2\n", bytes(range(256)),
    b"frames\n" + 200_000 * b"1" + b"\n"])
def test_metrics_that_cannot_be_read_are_one_line(content, tmp_path):
    if content is not None:
        (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(SystemExit) as error:
        plot.main([str(tmp_path)])
    assert str(error.value).startswith(f"plot.py: {tmp_path}/metrics.csv: ")
    assert "\n" not in str(error.value)


def test_picture_that_cannot_be_saved_is_one_line_and_leaves_nothing(tmp_path):
    run = write_metrics(tmp_path / "a")
    with pytest.raises(SystemExit, match=r"x\.foo: Format 'foo' is not supported"):
        plot.main([str(run), "--output", str(tmp_path / "x.foo")])
    with pytest.raises(SystemExit, match="Is a directory"):
        plot.main([str(run), "--output", str(run)])
    with no_room(1000), pytest.raises(SystemExit, match=r"curves\.png: File too large"):
        plot.main([str(run)])
    assert [path.name for path in run.iterdir()] == ["metrics.csv"]


def test_picture_that_cannot_be_drawn_anew_is_still_there(tmp_path):
    run = write_metrics(tmp_path / "a")
    plot.main([str(run)])
    before = (run / "curves.png").read_bytes()
    with no_room(1000), pytest.raises(SystemExit, match=r"curves\.png: File too large"):
        plot.main([str(run)])
    assert (run / "curves.png").read_bytes() == before


def test_a_label_given_twice_is_one_line(tmp_path):
    run = write_metrics(tmp_path / "a")
    with pytest.raises(SystemExit, match="a label is given twice"):
        plot.main([f"x={run}", f"x={run}", "--output", str(tmp_path / "x.png")])


def test_a_run_that_is_shorter_ends_the_mean_and_not_the_others(tmp_path, figures, capsys):
    """A seed that has just begun: the others are drawn as far as they go, and are not passed off as three seeds."""
    folders = [write_metrics(tmp_path / name, offset=20.0 * i, rows=rows) for i, (name, rows) in
               enumerate([("a", 20), ("b", 18), ("c", 2)])]
    plot.main([f"x={folders[0]},{folders[1]},{folders[2]}", f"y={folders[0]}", "--output", str(tmp_path / "x.png")])
    told = capsys.readouterr().err
    assert told.startswith(f"x: {folders[1]} ends at 0.018, {folders[2]} ends at 0.002 of 0.02 M frames; ")
    assert told.count("\n") == 1
    for axis, update in zip(figures[0].axes, (0.001, 1), strict=True):
        mean, a, b, y, _ = axis.lines
        np.testing.assert_allclose(mean.get_ydata()[[0, -1]], [20, 30], atol=1e-6)
        assert mean.get_xdata()[[0, -1]] == pytest.approx([update, 2 * update])
        for rest, offset, rows in ((a, 0, 20), (b, 20, 18)):
            np.testing.assert_allclose(rest.get_xdata(), update * np.arange(2, rows + 1))
            np.testing.assert_allclose(rest.get_ydata(), 10 * np.arange(1, rows) + offset)
            assert (rest.get_color(), rest.get_linewidth()) == (mean.get_color(), 0.7)
        assert y.get_xdata()[-1] == pytest.approx(20 * update)
    texts = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert texts == ["x, 3 seeds up to 0.002 M frames, then 2", "y, 1 seed"]


def test_runs_that_share_no_frames_have_no_mean(tmp_path, figures, capsys):
    """As where another has just begun, and its first update took a few frames less."""
    a, b = write_metrics(tmp_path / "a"), write_metrics(tmp_path / "b", rows=1)
    (b / "metrics.csv").write_text((b / "metrics.csv").read_text().replace("\n1000,", "\n990,"))
    plot.main([f"x={a},{b}", "--output", str(tmp_path / "x.png")])
    assert capsys.readouterr().err.startswith(f"x: {b} ends at 0.00099 of 0.02 M frames")
    mean, rest, _ = figures[0].axes[0].lines
    assert len(mean.get_xdata()) == 0
    assert rest.get_xdata()[[0, -1]] == pytest.approx([0.001, 0.02])


def test_runs_that_end_a_few_frames_apart_are_equally_long(tmp_path, figures, capsys):
    a, b = write_metrics(tmp_path / "a"), write_metrics(tmp_path / "b")
    (b / "metrics.csv").write_text((b / "metrics.csv").read_text().replace("\n20000,", "\n19900,"))
    plot.main([f"x={a},{b}", "--output", str(tmp_path / "x.png")])
    assert capsys.readouterr().err == ""
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == ["x, 2 seeds"]


def test_maps_of_several_policies_stand_one_below_the_other(tmp_path):
    good = ROOT / "results" / "weather" / "cnn" / "grid.json"
    grid = json.loads(good.read_text())
    lost = {"return_mean": [[-200.0] * 5] * 5, "landed_rate": [[0.0] * 5] * 5}
    (tmp_path / "lost.json").write_text(json.dumps(grid | lost))
    output = tmp_path / "compare.png"
    plot.main([str(good), str(tmp_path / "lost.json"), "--output", str(output)])
    picture = imread(output)
    assert picture.shape[:2] == (900, 1300)
    red, green = ([half[..., plane].mean() for half in (picture[:450], picture[450:])] for plane in (0, 1))
    assert green[0] > red[0]  # the shipped CNN lands in most weathers
    assert red[1] > green[1] + 0.2


UNEVEN = json.dumps({
    "checkpoint": "x", "mode": "greedy", "episodes": 1, "gravity": [-10, -8], "wind_power": [0, 20],
    "return_mean": [[1, 2], [3]], "landed_rate": [[0, 1], [1, 0]]})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"checkpoint": "x"}', UNEVEN, UNEVEN.replace("[3]", "3"), None])
def test_what_is_no_map_is_one_line(content, tmp_path):
    file = tmp_path / "grid.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match=r"^plot.py: .*grid.json: not what evaluate.py --grid writes"):
        plot.main([str(file)])
