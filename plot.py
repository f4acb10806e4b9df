"""Draws the curves of runs from their metrics.csv.

    python plot.py runs/NAME                                   # one run: all its diagnostics, as runs/NAME/curves.png
    python plot.py cnn=runs/a,runs/b resnet=runs/c --output compare.png  # several: return over frames and minutes
    python plot.py here/grid.json there/grid.json              # maps of evaluate.py --grid, one below the other

A label with several runs (seeds of one setting) is drawn as their mean, in a band from the lowest to the highest. Both
end where the shortest of the runs ends; longer ones go on as thin lines.
"""

import signal
import sys

if __name__ == "__main__" and "IPython" not in sys.modules:  # a notebook has a handler of its own
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no error

import argparse
import csv
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import yaml

from machinery.diagnostics import CLIP_FRACTION_BAND, KL_BAND
from machinery.drawing import Figure
from machinery.errors import UserError, one_line
from machinery.files import write_atomically
from task import ENV_ID, solved_mark

NEEDED = (
    "frames", "rollout/return_mean", "update/clip_fraction", "update/approx_kl",
    "update/entropy", "update/explained_variance", "eval/return_mean", "speed/total_seconds")


GRID = (  # what a map needs of a grid.json
    "checkpoint", "mode", "episodes", "seed", "gravity", "wind_power", "return_mean", "landed_rate")


class PlotError(UserError):
    """Metrics that cannot be read, or a picture that cannot be drawn."""


def read_metrics(run):
    """{column: float64 array (updates,)} of a run's folder or of a metrics.csv, nan where nothing was measured."""
    path = Path(run)
    path = path / "metrics.csv" if path.is_dir() else path
    try:
        whole = path.read_text().rpartition("\n")[0]  # what follows the last newline was cut off in writing
        header, *rows = list(csv.reader(whole.splitlines())) or [[]]
        columns = np.array([row for row in rows if len(row) == len(header)], float).T
    except (OSError, ValueError, csv.Error) as error:
        raise PlotError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    lacking = [key for key in NEEDED if key not in header]
    if header and lacking:
        raise PlotError(f"{path}: not the metrics of a run, it has no column {lacking[0]}")
    if not columns.size:
        raise PlotError(f"{path}: holds no update yet")
    return dict(zip(header, columns, strict=True))


def mark(run):
    """The mean return from which the environment of a run counts as solved; None if unknown."""
    path = Path(run)
    try:
        config = yaml.safe_load(((path if path.is_dir() else path.parent) / "config.yaml").read_text())
        return solved_mark(config["env"].get("id", ENV_ID))
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):  # metrics.csv alone
        return solved_mark(ENV_ID)


def reached(metrics, level):
    """(frames, seconds of training) when the mean training return first was `level` or more; None if it never was."""
    if level is None:
        return None
    over = metrics["rollout/return_mean"] >= level
    first = int(over.argmax())
    return (metrics["frames"][first], metrics["speed/total_seconds"][first]) if over.any() else None


def draw_run(run, output):
    """Six panels over environment frames, as a PNG: what a training run is steered by."""
    metrics = read_metrics(run)
    frames = metrics["frames"] / 1e6
    figure = Figure(figsize=(13, 6.5))  # no automatic layout: it draws all a second time, and training waits for this
    axes = figure.subplots(2, 3, sharex=True)
    figure.subplots_adjust(left=0.045, right=0.99, top=0.95, bottom=0.08, wspace=0.18, hspace=0.16)

    def panel(axis, title, key, label=None, band=None):
        if band:
            axis.axhspan(*band, color="tab:green", alpha=0.15, label=f"{band[0]:g} to {band[1]:g}")
        axis.plot(frames, metrics[key], linewidth=1, label=label)
        axis.set_title(title)
        axis.grid(alpha=0.3)

    panel(axes[0, 0], "return", "rollout/return_mean", "training, mean of the last 100 episodes")
    scored = ~np.isnan(metrics["eval/return_mean"])
    axes[0, 0].plot(frames[scored], metrics["eval/return_mean"][scored], "o", markersize=4, label="greedy, other seeds")
    if (solved := mark(run)) is not None:
        axes[0, 0].axhline(solved, color="black", linestyle=":", linewidth=1)
    panel(axes[0, 1], "clip fraction", "update/clip_fraction", band=CLIP_FRACTION_BAND)
    panel(axes[0, 2], "KL divergence from the collecting policy", "update/approx_kl", band=KL_BAND)
    axes[0, 2].set_ylim(0, max(1.1 * KL_BAND[1], float(metrics["update/approx_kl"].max())))
    if "rollout/landed_rate" in metrics:
        panel(axes[1, 0], "share of landings", "rollout/landed_rate")
        axes[1, 0].set_ylim(0, 1)
    else:
        panel(axes[1, 0], "steps of an episode", "rollout/length_mean")
    panel(axes[1, 1], "entropy of the policy, nats", "update/entropy")
    panel(axes[1, 2], "explained variance of the value", "update/explained_variance")
    axes[1, 2].set_ylim(-1, 1)
    axes[0, 0].locator_params(axis="x", nbins=6)  # of a short run the numbers are long
    for axis in axes[0]:
        axis.legend(fontsize=8, loc="lower right" if axis is axes[0, 0] else "upper right")
    for axis in axes[1]:
        axis.set_xlabel("environment frames, millions")
    save_figure(figure, output)


def draw_comparison(groups, output):
    """Training return over frames and over minutes. groups: {label: [run, ...]}, a band where a label has several."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    scales = (("frames", 1e6, "environment frames, millions"), ("speed/total_seconds", 60, "minutes of training"))
    runs = {label: [read_metrics(run) for run in folders] for label, folders in groups.items()}
    names, means = [f"{label}, {_seeds(label, groups[label], metrics)}" for label, metrics in runs.items()], []
    for axis, (key, unit, title) in zip(axes, scales, strict=True):
        for metrics in runs.values():
            begin, end = max(m[key][0] for m in metrics), min(m[key][-1] for m in metrics)
            grid = np.linspace(begin, end, 300 if begin <= end else 0)  # where all of them are
            curves = np.stack([np.interp(grid, m[key], m["rollout/return_mean"]) for m in metrics])
            (mean,) = axis.plot(grid / unit, curves.mean(0))
            means.append(mean)
            if len(metrics) > 1:
                axis.fill_between(grid / unit, curves.min(0), curves.max(0), color=mean.get_color(), alpha=0.2)
            for m in metrics:
                if m[key][-1] > end:
                    rest = np.append(max(end, m[key][0]), m[key][m[key] > end])
                    returns = np.interp(rest, m[key], m["rollout/return_mean"])
                    axis.plot(rest / unit, returns, color=mean.get_color(), linewidth=0.7)
        for solved in {mark(run) for folders in groups.values() for run in folders} - {None}:
            axis.axhline(solved, color="black", linestyle=":", linewidth=1)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("return, mean of the last 100 training episodes")
    axes[0].legend(means[: len(names)], names, loc="lower right")  # given here, so that a label may begin with _
    save_figure(figure, output)


def _seeds(label, folders, metrics):
    """How many runs a label's mean is of, and how far: "3 seeds", or "3 seeds up to 0.02 M frames, then 2".

    Says so of runs that end before the others. A difference of one update is none: an update has no fixed number of
    frames.
    """
    seeds = f"{len(metrics)} seed{'s' if len(metrics) > 1 else ''}"
    update = max(np.diff(m["frames"], prepend=0).max() for m in metrics)
    ends = [m["frames"][-1] for m in metrics]
    short = {str(folder): end for folder, end in zip(folders, ends, strict=True) if end + update < max(ends)}
    if not short:
        return seeds
    told = ", ".join(f"{folder} ends at {end / 1e6:.3g}" for folder, end in short.items())
    print(f"{label}: {told} of {max(ends) / 1e6:.3g} M frames; the mean ends with the first that ends, and longer runs "
          "go on as thin lines", file=sys.stderr)
    longer = sum(end > min(ends) + update for end in ends)
    return f"{seeds} up to {min(ends) / 1e6:.3g} M frames, then {longer}"


def draw_grids(grids, output):
    """Heat maps of mean return and landings over wind and gravity; a row for each dict of evaluate.evaluate_grid."""
    figure = Figure(figsize=(13, 4.5 * len(grids)), layout="constrained")
    maps = (
        ("return_mean", "mean return", "{:.0f}", (-200, 300)), ("landed_rate", "share of landings", "{:.0%}", (0, 1)))
    for grid, row in zip(grids, figure.subfigures(len(grids), 1, squeeze=False)[:, 0], strict=True):
        for axis, (key, title, form, limits) in zip(row.subplots(1, 2), maps, strict=True):
            values = np.array(grid[key])  # (gravities, winds)
            image = axis.imshow(values, cmap="RdYlGn", vmin=limits[0], vmax=limits[1], aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                dark = abs(image.norm(value) - 0.5) > 0.35
                axis.text(x, y, form.format(value), ha="center", va="center", color="white" if dark else "black")
            axis.set_xticks(range(len(grid["wind_power"])), [f"{wind:g}" for wind in grid["wind_power"]])
            axis.set_yticks(range(len(grid["gravity"])), [f"{gravity:g}" for gravity in grid["gravity"]])
            axis.set(title=title, xlabel="wind power; turbulence is a tenth of it", ylabel="gravity")
            row.colorbar(image, ax=axis)
        played = f"{grid['episodes']} episodes each, from seed {grid['seed']:,}"
        row.suptitle(f"{grid['checkpoint']}, {grid['mode']}, {played}")
    save_figure(figure, output)


def read_grid(path):
    """The dict in a grid.json of evaluate.py --grid."""
    try:
        grid = json.loads(Path(path).read_text())
        grid = {key: grid[key] for key in GRID}
        for key in ("return_mean", "landed_rate"):
            grid[key] = np.array(grid[key], float).reshape(len(grid["gravity"]), len(grid["wind_power"]))
        return grid
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlotError(f"{path}: not what evaluate.py --grid writes ({reason})") from None


def save_figure(figure, output):
    """The picture under `output`, whole or not at all, in the format that its name says; PlotError if it cannot be."""
    picture = BytesIO()
    try:
        figure.savefig(picture, dpi=100, format=Path(output).suffix[1:] or "png")
        write_atomically(output, picture.getvalue())
    except ValueError as error:  # a format that matplotlib does not know
        raise PlotError(f"{output}: {error}") from None
    except OSError as error:
        raise PlotError(f"{output}: {error.strerror or error}") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN | LABEL=RUN,RUN")
    parser.add_argument("--output", type=Path, help="PNG; default: curves.png in the run's folder, or compare.png")
    args = parser.parse_args(argv)
    with one_line("plot.py"):
        if all(run.endswith(".json") for run in args.runs):
            output = args.output or Path("compare.png")
            draw_grids([read_grid(run) for run in args.runs], output)
        elif len(args.runs) == 1 and "=" not in args.runs[0]:
            run = Path(args.runs[0])
            output = args.output or (run if run.is_dir() else run.parent) / "curves.png"
            draw_run(run, output)
        else:
            output = args.output or Path("compare.png")
            named = [run.rpartition("=") for run in args.runs]
            groups = {label or Path(runs).name: runs.split(",") for label, _, runs in named}
            if len(groups) < len(named):
                raise PlotError("a label is given twice; several runs of one label are written LABEL=RUN,RUN")
            draw_comparison(groups, output)
    print(output)


if __name__ == "__main__":
    main()
