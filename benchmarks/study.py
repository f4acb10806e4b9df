"""Several seeds, and each piece left out: keeps what such runs measured under results/study/, and writes its page.

    python benchmarks/study.py "cnn_no_tilt=runs/a,runs/b" "no mirror=runs/c"   # copies these, then writes the page
    python benchmarks/study.py                                                  # only the page

The runs come from train.py, sweep.py or benchmarks/yardstick.py. The last table of the page is read from their own
metrics.csv and reports; a run's folder keeps those, its config and the machine, but no weights. What the text above it
says must be read from that table by whoever changes it.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from machinery.config import ConfigError, load_config
from machinery.publish import FILES, score
from plot import PlotError, draw_comparison, reached, read_metrics
from task import SOLVED

STUDY = Path(__file__).parent.parent / "results" / "study"
PAGE = f"""# Seeds and pieces

This page compares trainings of the CNN: with several seeds, with pieces left out of `cnn_no_tilt`, and variants of
`cnn`, whose eye also measures how the lander lies ([eyes.md](../../docs/eyes.md#how-it-lies) tells what that brings).
The runs of the first table are in this folder, and the last table lists them. Of the others, only scores are kept.

## The worth of each piece

| line | changed setting | frames to {SOLVED}, each seed | greedy | landed |
| --- | --- | --- | --- | --- |
| cnn | an eye for tilt, and more | 0.21, 0.13, 0.09, 0.13, 0.15 M | 285, 286, 283, 285, 283 | 100, 100, 99, 100, 99% |
| shorter | as `cnn`, 1.6 M frames, rate falls linearly | 0.16, 0.11, 0.09 M | 284, 283, 284 | 100, 100, 100% |
| quick | `configs/quick.yaml` | 0.13, 0.09, 0.16, 0.10, 0.20 M | | |
| four steps | as "shorter", decides every four steps | 0.15, 0.31, 0.23 M | 278, 279, 276 | 99, 100, 98% |
| cnn_no_tilt | none | 0.42, 0.44, 0.42 M | 274, 268, 269 | 98, 97, 97% |
| no late stage | `ppo.late_return=null` | 0.63, 0.43 M | 269, 280 | 98, 100% |
| no mirror | `model.mirror=false` | 0.53, 0.45 M | 263, 264 | 98, 98% |
| whole pixels | `model.subpixel=false` | 0.61, 0.70 M | 253, 262 | 94, 96% |
| no glimpse | `model.eye=none`, and two more | not reached | 91, 3 | 40, 6% |
| state vector | a yardstick, without frames | 0.51, 0.40, 0.59 M | 234, 247, 263 | 95, 96, 100% |

`cnn` is trained by `configs/cnn.yaml`, "shorter" by the same with `ppo.anneal=1 ppo.total_frames=1_600_000`, "four
steps" with `env.frame_skip=4 ppo.gamma=0.995 ppo.anneal=1 ppo.total_frames=1_200_000`, and "quick" by
`configs/quick.yaml`, stopped at {SOLVED}. Every other line is trained by
`python train.py --config configs/cnn_no_tilt.yaml run.seed=SEED` and its changed setting. "No glimpse" has three:
`model.eye=none model.mirror=false env.shrink_factor=8`. The policy then sees whole frames at half the resolution,
75x50, without a mirror. The yardstick is trained by
`python benchmarks/yardstick.py --config configs/cnn_no_tilt.yaml run.seed=SEED`.

- **The glimpse** is worth the most to a network that flattens its last map. Without it, without the mirror and at half
  the resolution, the mean return never reaches {SOLVED}. With glimpses cut along whole pixels, learning takes more
  frames and ends lower.
- **The mirror** is worth some frames and a few points, as far as two seeds can tell.
- **The late stage** makes learning faster. Seeds 1 and 2 were at 240 after 0.57 and 0.67 million frames with it, and
  after 0.78 and 1.02 million without it. Their final scores were as good without it, so a longer training can leave it
  out: `ppo.late_return=null`.
- **How long it learns**, and in how small steps at the end, is worth two points: ["The last points"](#the-last-points).
- **How often it decides** is worth five points, with a third more frames. How soon {SOLVED} comes differs more
  from seed to seed. An engine burns for the whole of a decision. With shorter ones the lander comes to rest nearer to
  the middle of the pad, more often on both legs, and spends less fuel. Each frame then costs a third more arithmetic.
  [Below](#how-often-it-decides) are the numbers.
- **How soon** it lands: `configs/quick.yaml` is `cnn` with a learning rate that stays as it is until the late stage.
  Five seeds of it, with both cores of a Xeon with AVX-512 and bfloat16 to themselves, were at 200 after 54, 40, 74, 47
  and 96 seconds, start-up apart. With the same settings the yardstick (`--config configs/quick.yaml
  ppo.total_frames=1_000_000`) took 70 and 77 seconds and 0.72 and 0.74 million frames; its third seed was never there.
- **The yardstick** is the same PPO with the same settings, on the state vector instead of frames. The settings were
  chosen for frames. With settings of its own the state vector is sooner there than frames: after 0.08, 0.08, 0.07, 0.15
  and 0.10 million frames and 36, 36, 32, 65 and 44 seconds, seeds 1 to 5, two at a time (`--config configs/quick.yaml
  run.seed=SEED ppo.num_steps=16 ppo.num_minibatches=16 ppo.update_epochs=8 ppo.learning_rate=2e-3
  ppo.gae_lambda=0.98`). They are the best of 23 trials with Optuna, all with seed 1, rounded. Each decision is learned
  from twice as often as in `quick`, and rollouts are half as long. Frames don't take to that: with `ppo.num_steps=16
  ppo.update_epochs=8 ppo.gae_lambda=0.98`, seeds 1 to 3 of `quick` had means of 167, -42 and 72 after its 0.20 million
  frames, and clip fractions of 0.23 to 0.34 on average in the second half.

![return over frames and minutes](compare.png)

## Inductive bias

A policy must discover all that it is not told. The [results table](../../README.md#results) and the
[worth of each prior](../../docs/eyes.md#what-each-prior-is-worth) allow some conclusions, from two or three seeds a
setting:

- **Where to look** need not be told. An eye that learns it is worth as much as one that knows the colour, and attention
  over whole frames needs but a quarter more of them. An eye saves arithmetic above all.
- **That left mirrors right** is worth a tenth to a quarter of the frames with an eye, and more than half of them
  without one.
- **That it has a tilt**, which the eye of `cnn` measures, saves more than all of these:
  [eyes.md](../../docs/eyes.md#how-it-lies).
- **That a lander looks the same everywhere** is worth the most. A network that flattens its last map has to learn each
  place by itself. It stood at 91 and 3 after 1.5 million frames ("no glimpse"). With attention in place of flattening,
  and nothing told at all, it lands, after 1.1 to 1.6 million.
- **The architecture** matters little once one of these has found the spot. With the tilt, the Transformer passes
  {SOLVED} after 0.31, 0.21 and 0.21 million frames, the TemporalResNet after 0.22, 0.20 and 0.23, and the CNN after
  0.21, 0.13, 0.09, 0.13 and 0.15. The prior of convolutions also saves time: the CNN needs the least arithmetic per
  decision.

## How often it decides

`env.frame_skip` is the number of physics steps to a decision, `ppo.gamma` the discount per decision. Rows that name
only steps are "shorter" (3) and "four steps" (4). The other policies had a million frames with four. All are scored on
seeds that chose no checkpoint, from 3,000,000 and from 8,000,000 (`python benchmarks/points.py results/cnn --episodes
1000 --seed 3000000`):

| steps | gamma | training seed | 1,000 episodes | landed | 400 others | legs | fuel | distance |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 3 | 0.996 | 1 | 284.4 [283.1, 285.7] | 99.7% | 285.1 | 19.8 | -25.3 | -2.9 |
| 3 | 0.996 | 2 | 283.1 [281.5, 284.6] | 99.4% | 283.9 | 18.9 | -24.3 | -3.7 |
| 3 | 0.996 | 3 | 285.3 [283.8, 286.6] | 99.7% | 284.1 | 19.0 | -23.7 | -3.0 |
| 3, 512 units | 0.996 | 2 | 283.5 [282.2, 284.8] | 99.8% | 283.3 | 19.6 | -25.7 | -3.4 |
| 3, 2.4 M frames | 0.996 | 4 | 283.6 | 99.0% | | 19.1 | -23.9 | -2.9 |
| 3, 2.3 of 2.4 M frames | 0.996 | 5 | 284.9 | 98.9% | | 19.4 | -22.5 | -2.7 |
| 4 | 0.995 | 1 | 279.1 | 99.5% | 280.0 | | | |
| 4 | 0.995 | 3 | | | 281.0 | 18.5 | -26.4 | -4.3 |
| 3, `transformer`, 1.3 M frames | 0.996 | 1 | 279.9 | 99.7% | 279.4 | 19.2 | -29.0 | -3.4 |
| 4, `transformer` | 0.995 | 1 | 278 | 99.3% | 276 | | | |
| 3, `temporal_resnet`, 1.3 M frames | 0.996 | 2 | 277.8 | 99.1% | 275.5 | 18.9 | -28.2 | -4.4 |
| 4, `temporal_resnet` | 0.995 | 1 | 275 | 98.3% | 273 | | | |

The last three columns are points: what legs on the ground give, what fuel and the distance from the pad's middle take.
With two steps to a decision and `ppo.gamma=0.9975`, one seed was at {SOLVED} after 0.13 million frames, and when it was
stopped after 0.75 million the last 100 training episodes had 282, where three seeds with three steps had 266, 273 and
271. But another had 269 between 0.4 and 0.6 million frames, as three seeds with three steps have there: 265, 269 and
264. So there may be little in still shorter decisions, at two thirds of the frames a second.

The state vector gains as well: the prototype of [eyes.md](../../docs/eyes.md#how-it-lies) has 287 over 400 seeds with
three steps and 1.8 million frames, in place of 284 with four, and lands in all of them. With two it has 278 and lands
in 97%.

## The last points

One crash in a hundred flights costs two to three points. A longer training alone does not end them: of the seeds above,
the two of 2.4 million frames crash most, though one of them wastes the least fuel. (That one was cut off shortly before
its end.) A longer training that ends in many small steps does. With `ppo.anneal=2` the learning rate falls as
the square of the share of frames that remain. In 2.0 million frames that brings nothing. In 3.0 million, 29 to 42
minutes on one core, it gives `cnn`, the first five rows here. All five have more points than the best of "shorter", and
crash as seldom. The shipped one is the median, seed 1.

| `cnn`, and what else was tried | training seed | frames | 1,000 episodes | landed | fuel |
| --- | --- | --- | --- | --- | --- |
| `cnn` | 1 | 3.0 M | 285.9 | 99.7% | -23.5 |
| `cnn` | 2 | 3.0 M | 286.4 | 99.6% | -23.0 |
| `cnn` | 3 | 3.0 M | 286.6 | 100.0% | -23.5 |
| `cnn` | 4 | 3.0 M | 285.8 | 99.7% | -24.0 |
| `cnn` | 5 | 3.0 M | 285.6 | 99.5% | -23.2 |
| 2.0 M frames | 1 | 2.0 M | 282.2 | 99.0% | -24.8 |
| 2.0 M frames | 2 | 2.0 M | 284.1 | 100.0% | -26.0 |
| 2.0 M frames, another machine | 2 | 2.0 M | 284.9 | 99.9% | -25.0 |
| "shorter", and 30% of the training episodes begin from a start that failed | 1 | 1.6 M | 283.7 | 100.0% | -26.4 |
| "shorter", and 20% | 2 | 2.4 M | 282.7 | 99.6% | -26.0 |
| seed 5 above goes on, from a rate of 1e-4 to 0 | 5 | 2.3 + 0.4 M | 285.5 | 99.9% | -24.5 |
| and 30% of the episodes begin from a start that failed | 5 | 2.3 + 0.4 M | 285.3 | 99.6% | -23.9 |
| `transformer` | 1 | 1.8 M | 282.5 | 99.8% | -27.2 |
| `transformer` | 2 | 1.8 M | 282.8 | 99.9% | -27.3 |
| `transformer` | 3 | 1.8 M | 282.6 | 99.8% | -26.3 |
| its late rate a quarter of the first, and `ppo.anneal=2` | 1 | 2.4 M | 282.1 | 98.4% | -23.5 |
| its late rate a quarter, and `ppo.anneal=2` | 1, both cores | 2.4 M | 280.3 | 98.2% | -24.0 |
| its late rate a quarter, and `ppo.anneal=2` | 2 | 2.4 M | 282.8 | 99.7% | -24.9 |
| its late rate a quarter, and `ppo.anneal=2` | 3 | 2.4 M | 281.3 | 99.9% | -28.0 |
| `temporal_resnet`, one core | 1 | 2.1 M | 286.2 | 100.0% | -24.0 |
| `temporal_resnet`, both cores | 2 | 2.1 M | 285.1 | 99.8% | -25.1 |
| `temporal_resnet`, one core | 2 | 2.1 M | 286.0 | 99.7% | -22.1 |
| `temporal_resnet`, one core | 3 | 2.1 M | 283.8 | 99.6% | -24.6 |
| 1.5 M frames | 1 | 1.5 M | 282.3 | 100.0% | -27.3 |
| its late rate a quarter of the first, and `ppo.anneal=2` | 1 | 1.8 M | 274 (of 100) | 99% | |
| its late rate half, and `ppo.anneal=2` | 1 | 1.8 M | 278.9 | 99.4% | -29.7 |

In the rows with failed starts, each lander chose from its last 16, the simplest form of prioritised level replay
([Jiang et al. 2021](https://arxiv.org/abs/2010.03934)). It makes flights cautious, and brings nothing in all.

A longer training with `ppo.anneal=2` was tried for the Transformer, too (`ppo.total_frames=2_400_000 ppo.anneal=2
ppo.late_learning_rate=0.25`). From 2.1 million frames on nothing is clipped: such steps are too small to bring
anything. The same settings were too cautious for the TemporalResNet: at 1.4 million frames its KL was 0.0002. Both need
larger steps late, not smaller ones: half of the first learning rate in the late stage instead of a quarter, and a rate
that falls linearly.

Three quarters of the frames then bring the Transformer as many points as the best of those runs, and one or two of
1,000 flights do not end in a landing, instead of 1 to 18. On one core each, beside another training, three took 40 to
45 minutes. With 1.3 million frames and a quarter (`ppo.total_frames=1_300_000 ppo.late_learning_rate=0.25
evaluation.interval=250_000 evaluation.selection_episodes=40`) it has 279.9.

The TemporalResNet is with 2.1 million frames as good as `cnn`. Seed 2, with both cores to itself, took 49 minutes.
Seeds 1 and 3, on one core each, beside each other, took 46 and 47. On a day when the same machine was slower they took
75 and 76, and ended bit for bit the same. With 1.3 million frames (the same options) it has 277.8.

Of the TemporalResNet, one seed was trained again with both cores. Sums are then rounded otherwise, so the same seed
becomes another policy. The new run takes the place of the old one of its seed. The median of the three is shipped: seed
3 of `transformer`, seed 2 of `temporal_resnet`.

LunarLander pays what brings a lander nearer to rest on the pad, so the points of a flight can be taken apart. The table
does so for the 1,000 episodes of the shipped `cnn` (`python benchmarks/points.py results/cnn --episodes 1000 --seed
3000000`):

| ended | episodes | return | start | bonus | legs | fuel | distance | speed | tilt | costs the mean |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| landed, 250 or more | 96.3% | 288 | 195.1 | 100.0 | 19.5 | -23.5 | -2.8 | -0.0 | -0.2 | 0.0 |
| landed, below 250 | 3.4% | 245 | 153.8 | 100.0 | 19.4 | -21.4 | -4.8 | -0.0 | -1.9 | 1.5 |
| crash | 0.3% | 65 | 216.2 | -100.0 | 20.0 | -23.8 | -5.2 | -33.7 | -8.9 | 0.7 |
| all | 100.0% | 286 | 193.8 | 99.4 | 19.5 | -23.5 | -2.9 | -0.1 | -0.3 | 2.1 |

*Start* is what a flight from there to rest on the pad is worth. The landings below 250 are hardly worse than others:
they began with less speed, so there was less to gain. None hung in the air until its time was over. A better pilot
could still save fuel, and gain three points by touching down nearer to the middle of the pad.

The state vector is no ceiling for this PPO. With the settings of `cnn` and 10 million frames (`python
benchmarks/yardstick.py --config configs/cnn.yaml ppo.total_frames=10_000_000 evaluation.episodes=1000`, one seed, 18
minutes on one core) it has 262 [260, 264] over 1,000 episodes, and lands 98%. It hovers: a flight takes 290 physics
steps, one of `cnn` 188. The settings were chosen for frames. A prototype with the mirror, and as many units as `cnn`,
has 287 ([eyes.md](../../docs/eyes.md#how-it-lies)).

## Clip fraction with and without the late stage

The band of 0.1 to 0.2 for the clip fraction ([how to read it](../../docs/curves.md)) is a guide, not a law.

- Seed 1 of `cnn_no_tilt` is at the upper edge of the band, 0.20 on average, until the late stage begins at 0.35 million
  frames. From there on its steps are a quarter as large, and it is below the band.
- Seed 1 without a late stage is the same run up to there. It stays in the band for most of its first half, and learns
  more slowly. It was at {SOLVED} after 0.63 million frames instead of 0.42, and at 240 after 0.78 instead of 0.57.

## All runs

{{table}}

"To {SOLVED}" is the moment when the mean return of the last 100 training episodes first reached {SOLVED}. A line with
several seeds has a median, in which "not reached" counts as the worst. Scores are means over 100 unseen seeds with 95%
intervals. All lines but the state vector see frames only. The `config.yaml` of each run holds its settings, its
`metrics.csv` the measurements. A run without a score was stopped before its end. Minutes are wall-clock time. Where the
config says `num_threads: 1`, they were measured on one core of two, with other work beside it.

The table, this page and the picture are written by `python benchmarks/study.py`.
"""


def keep(label, runs):
    """Copy what `runs` measured to a folder per label and seed."""
    seeds = {Path(run): load_config(Path(run) / "config.yaml").run.seed for run in runs}
    if len(set(seeds.values())) < len(seeds):
        raise PlotError(f"{label}: two of its runs have the same seed")
    for run, seed in seeds.items():
        folder = STUDY / label.replace(" ", "-") / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)  # of the run that was here before
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
            solved.append(reached(metrics, SOLVED) or (float("inf"), float("inf")))
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
