"""Several seeds, and each piece left out: keeps what such runs measured under results/study/, and writes its page.

    python benchmarks/study.py "whole=runs/a,runs/b" "no mirror=runs/c,runs/d"   # copies these, then writes the page
    python benchmarks/study.py                                                     # only the page

The runs come from train.py, sweep.py or benchmarks/yardstick.py. Every number on the page is read from their own
metrics.csv and reports; a run's folder keeps those, its config and the machine, but no weights.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import ConfigError, load_config
from plot import SOLVED, PlotError, draw_comparison, reached, read_metrics
from publish import FILES, score

STUDY = Path(__file__).parent.parent / "results" / "study"
PAGE = f"""# Seeds and pieces

{{table}}

"To {SOLVED}": when the mean return of the last 100 training episodes first reached it; medians where a line has several
seeds and "not reached" counts as the worst. Scores are means over 100 unseen seeds with 95% intervals. The state vector
is a yardstick, the same PPO without eyes to train; all others see frames only. What each run was set to is in its
`config.yaml`, what it measured in its `metrics.csv`; one without a score was stopped before its end. Minutes are
wall-clock, on one core of two, with other work beside it, where the config says `num_threads: 1`.

![return over frames and minutes](compare.png)
"""


def keep(label, runs):
    """Copy what `runs` measured to a folder per label and seed."""
    for run in map(Path, runs):
        seed = load_config(run / "config.yaml").run.seed
        folder = STUDY / label.replace(" ", "-") / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (run / name).exists() or "report" not in name:  # a run may have been stopped before its score
                shutil.copy(run / name, folder)


def rows(groups):
    """The table in Markdown. groups: {label: [folder of a seed, ...]}."""
    yield f"| | seed | trained for | frames to {SOLVED} | minutes to {SOLVED} | greedy, landed | sampled, landed |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for label, folders in groups.items():
        solved = []
        for folder in folders:
            metrics, seed = read_metrics(folder), load_config(folder / "config.yaml").run.seed
            solved.append(reached(metrics) or (float("inf"), float("inf")))
            trained = f"{metrics['frames'][-1] / 1e6:.1f} M frames, {metrics['speed/total_seconds'][-1] / 60:.0f} min"
            yield (
                f"| {label} | {seed} | {trained} | {_millions(solved[-1][0])} | {_minutes(solved[-1][1])} | "
                f"{_scored(folder, 'report.json')} | {_scored(folder, 'report_sampled.json')} |")
        if len(folders) > 1:
            frames, seconds = (statistics.median(values) for values in zip(*solved, strict=True))
            yield f"| {label} | median | | **{_millions(frames)}** | **{_minutes(seconds)}** | | |"


def _scored(folder, name):
    if not (folder / name).exists():
        return ""
    report = json.loads((folder / name).read_text())
    return f"{score(report)}, {report['landed_rate']:.0%}"


def _millions(frames):
    return "not reached" if frames == float("inf") else f"{frames / 1e6:.2f} M"


def _minutes(seconds):
    return "not reached" if seconds == float("inf") else f"{seconds / 60:.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="LABEL=RUN,RUN")
    args = parser.parse_args()
    try:
        for named in args.runs:
            label, _, runs = named.partition("=")
            keep(label, runs.split(","))
        groups = {}
        for folder in sorted(STUDY.glob("*/seed-*")):
            groups.setdefault(folder.parent.name.replace("-", " "), []).append(folder)
        (STUDY / "README.md").write_text(PAGE.format(table="\n".join(rows(groups))))
        draw_comparison(groups, STUDY / "compare.png")
    except (ConfigError, PlotError, OSError) as error:
        sys.exit(f"study.py: {error}")


if __name__ == "__main__":
    main()
