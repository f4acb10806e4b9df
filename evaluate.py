"""Scores a policy on seeded episodes of the unmodified environment and records videos.

    python evaluate.py                                        # the newest run's best; with no run yet, the shipped one
    python evaluate.py --checkpoint results/cnn --episodes 100 --seed 1000000 --videos 5
    python evaluate.py --checkpoint runs/NAME --sample --output somewhere
    python evaluate.py --checkpoint results/cnn --episodes 1 --videos 1 --panel   # what goes on inside it
    python evaluate.py --checkpoint results/cnn --watch                           # live, in a window
    python evaluate.py --checkpoint results/cnn env.enable_wind=true              # in another weather than trained in
    python evaluate.py --checkpoint results/cnn --grid --episodes 20              # in many: a table and a picture

Episode i uses seed + i; training never uses seeds from 1,000,000 on. The policy sees the frames of
`gym.make("LunarLander-v3", render_mode="rgb_array")`, or of the environment that it was trained in, rendered once per
step, and nothing else.
"""

import signal
import sys

if __name__ == "__main__" and "IPython" not in sys.modules:  # a notebook has a handler of its own
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no error

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from envs import make_env
from machinery.checkpoint import load_policy
from machinery.config import ConfigError, apply_overrides, key_of
from machinery.device import cores_for
from machinery.errors import one_line
from machinery.files import newest_run, write_atomically
from machinery.processes import SINGLE_PROCESS
from machinery.terminal import Outlet
from machinery.video import VideoRecorder, write_webp
from task import CALM, ENV_ID, EVALUATION_SEED, solved_mark

MAX_EPISODES = 50  # episodes played side by side; bounds memory
GRAVITIES, WINDS = [-4.0, -6.0, -8.0, -10.0, -11.9], [0.0, 5.0, 10.0, 15.0, 20.0]  # of evaluate_grid


@torch.no_grad()
def play(policy, env_config, seeds, *, sample_seed=None, rendered=False, recorder=None, progress=None, check=None,
         make_env=make_env):
    """Play one episode per seed, many side by side so that the policy sees them as one batch.

    Greedy, or, with sample_seed, actions sampled from generators seeded with (sample_seed, episode's seed). rendered:
    frames are those of the unmodified environment's `render()`, as videos and reported scores need them.
    The recorder, such as a VideoRecorder, is told when an episode begins, what is decided in it, and when it ends.
    `check`, called before each decision, may raise to end all episodes. make_env: another maker of environments than
    envs.make_env. Returns (returns, lengths, outcomes), arrays in the order of `seeds`.
    """
    policy.eval()
    device = next(policy.parameters()).device
    waiting, results, playing = list(enumerate(seeds)), [None] * len(seeds), []

    def begin(env):
        if not waiting:
            return
        index, seed = waiting.pop(0)
        if recorder:
            recorder.begin(index, env)
        rng = None if sample_seed is None else np.random.default_rng([sample_seed, seed])
        playing.append((env, index, env.reset(seed), rng))

    for _ in range(min(MAX_EPISODES, len(seeds))):
        begin(make_env(rendered=rendered, **env_config.settings()))
    while playing:
        if check:
            check()
        frames = torch.from_numpy(np.stack([frames for _, _, frames, _ in playing])).to(device)
        output = policy(*policy.preprocess_stacks(frames))
        if sample_seed is None:
            actions = output.distribution.mode()
        else:
            actions = output.distribution.sample([rng for _, _, _, rng in playing])
        batch, playing = playing, []
        for row, ((env, index, frames, rng), action) in enumerate(zip(batch, actions.tolist(), strict=True)):
            if recorder:
                recorder.decide(index, env, frames, output, row, action)
            frames, _, terminated, truncated = env.step(action)
            if not (terminated or truncated):
                playing.append((env, index, frames, rng))
                continue
            results[index] = env.episode_return, env.episode_length, env.outcome()
            if recorder:
                recorder.end(index, env)
            begin(env)
            if progress:
                progress.update()
    returns, lengths, outcomes = zip(*results, strict=True)
    return np.array(returns), np.array(lengths), np.array(outcomes)


def confidence_interval(values, level=0.95, resamples=10_000):
    """Percentile bootstrap interval of the mean (Efron 1979): [low, high]. Returns are far from normal."""
    values = np.asarray(values, float)
    rng, n, part = np.random.default_rng(0), len(values), 100  # at once, all of them would need gigabytes
    means = [values[rng.integers(n, size=(part, n))].mean(1) for _ in range(resamples // part)]
    tail = 100 * (1 - level) / 2
    return [float(v) for v in np.percentile(means, [tail, 100 - tail])]


def rates(task, returns, outcomes):
    """{name: share of the episodes}, of what can be said of that task."""
    solved = {} if task.solved is None else {"solved_rate": float((returns >= task.solved).mean())}
    landed = {} if task.landed is None else {"landed_rate": float((outcomes == task.landed).mean())}
    return solved | landed


def summarize(task, returns, lengths, outcomes):
    """The part of a report that the episodes determine."""
    return {
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_ci95": confidence_interval(returns),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        **rates(task, returns, outcomes),
        "length_mean": float(lengths.mean()),
        "env_frames": int(lengths.sum()),
        "returns": [float(value) for value in returns],
    }


def evaluate(policy, config, checkpoint, output, episodes=100, seed=EVALUATION_SEED, videos=0, sample=False,
             report_name="report.json", video_name="seed-{seed}", panel=False, check=None):
    """Score `policy`, print the report, write it and the videos of the first `videos` episodes; the report.

    For `check`, see `play`.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    make_panel = None
    if panel:
        from machinery.panel import Panel  # and matplotlib with it

        def make_panel(episode):
            return Panel(policy, config, f"{config.model.name}, {'sampled' if sample else 'greedy'}, {episode}")

    recorder = VideoRecorder(output / "videos", videos, seed, video_name, make_panel)
    start = time.perf_counter()
    quiet = not config.tracking.progress or None  # None: only where the output is no terminal
    with recorder, tqdm(total=episodes, desc="evaluating", unit="episode", disable=quiet, leave=False) as progress:
        results = play(
            policy, config.env, range(seed, seed + episodes), sample_seed=seed if sample else None,
            rendered=True, recorder=recorder, progress=progress, check=check)
    report = {
        "checkpoint": str(checkpoint),
        "policy": config.model.name,
        "mode": "sampled" if sample else "greedy",
        "episodes": episodes,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        **summarize(config.env.task, *results),
    }
    report["env"] = config.env.described()
    print_report(report)  # before it is written: a full disk must not cost the score
    write_atomically(output / report_name, (json.dumps(report, indent=2) + "\n").encode())
    return report


def evaluate_grid(policy, config, checkpoint, output, episodes, seed=EVALUATION_SEED, sample=False):
    """Score `policy` in every weather of GRAVITIES x WINDS; print a table, write grid.json and grid.png to `output`."""
    from plot import draw_grids  # and matplotlib with it

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    grid = {"checkpoint": str(checkpoint), "policy": config.model.name, "mode": "sampled" if sample else "greedy",
            "episodes": episodes, "seed": seed, "gravity": GRAVITIES, "wind_power": WINDS,
            "turbulence_power": [wind / 10 for wind in WINDS], "return_mean": [], "landed_rate": []}
    print("Mean return, and share of landings; the turbulence is a tenth of the wind.")
    print("| gravity | " + " | ".join(f"wind {wind:g}" for wind in WINDS) + " |")
    print("| --- " * (len(WINDS) + 1) + "|")
    for gravity in GRAVITIES:
        scores = []
        for wind in WINDS:
            weather = {"gravity": gravity, "enable_wind": wind > 0, "wind_power": wind, "turbulence_power": wind / 10}
            returns, _, outcomes = play(
                policy, config.env.model_copy(update=weather), range(seed, seed + episodes),
                sample_seed=seed if sample else None, rendered=True)
            scores.append((float(returns.mean()), rates(config.env.task, returns, outcomes)["landed_rate"]))
        means, landed = map(list, zip(*scores, strict=True))
        grid["return_mean"].append(means)
        grid["landed_rate"].append(landed)
        print(f"| {gravity:g} | " + " | ".join(f"{mean:.0f}, {rate:.0%}" for mean, rate in scores) + " |", flush=True)
    write_atomically(output / "grid.json", (json.dumps(grid, indent=2) + "\n").encode())
    draw_grids([grid], output / "grid.png")
    return grid


def print_report(report):
    low, high = report["return_ci95"]
    rows = [
        ("policy", f"{report['policy']}, {report['mode']}  ({report['checkpoint']})"),
        ("episodes", f"{report['episodes']}, seeds {report['seed']} to {report['seed'] + report['episodes'] - 1}"),
        ("return", f"{report['return_mean']:.1f} ± {report['return_std']:.1f}   95% interval of the mean "
                   f"{low:.1f} to {high:.1f}   range {report['return_min']:.1f} to {report['return_max']:.1f}"),
        ("took", f"{report['seconds']:.0f} s for {report['env_frames']:,} rendered frames"),
    ]
    steps = f"{report['length_mean']:.0f} steps on average"
    if "landed_rate" in report:
        rows.insert(3, ("landed", f"{100 * report['landed_rate']:.0f}% end at rest, {steps}"))
    else:
        rows.insert(3, ("length", steps))
    env = dict(report["env"])
    mark = solved_mark(env.pop("id"))
    if "solved_rate" in report:
        rows.insert(3, ("solved", f"{100 * report['solved_rate']:.0f}% with a return of {mark:g} or more"))
    if env:
        rows.insert(1, ("options", ", ".join(f"{key} {value}" for key, value in env.items())))
    print("\n".join(f"{key:>9}  {value}" for key, value in rows))


def in_weather(config, overrides):
    """`config` in another weather, `env.key=value`, or with other env.options; all else belongs to the policy."""
    changed = apply_overrides(config.model_dump(mode="json"), overrides)
    keys = list(map(key_of, overrides))
    allowed = tuple(f"env.{key}" for key in (CALM if config.env.id == ENV_ID else ["options"]))
    if refused := [key for key in keys if key not in allowed]:
        raise ConfigError(f"{refused[0]}: a policy is scored as it was trained; only {', '.join(allowed)} may differ")
    tasks = config.env.task, changed.env.task
    before, after = ((task.viewport, task.continuous, task.actions) for task in tasks)
    if after != before:
        raise ConfigError(f"{', '.join(overrides)}: other frames or actions than those that this policy was made for")
    return changed


def default_checkpoint():
    """The newest run with a best policy; with no run yet, the shipped CNN."""
    return newest_run(holding="checkpoints/policy.safetensors") or Path(__file__).parent / "results" / "cnn"


def whole(low, high):
    """An argparse type: a whole number in this range."""
    def parse(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high:,}, not {text!r}")
        return int(text)
    return parse


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="runs/NAME, results/NAME or a .safetensors file")
    parser.add_argument("--episodes", type=whole(1, 100_000), default=100)
    parser.add_argument("--seed", type=whole(0, 2**31 - 1), default=EVALUATION_SEED, help="seed of the first episode")
    parser.add_argument("--videos", type=whole(0, 100_000), default=3, help="record this many of the episodes")
    parser.add_argument("--panel", action="store_true", help="beside each video, another with an instrument panel")
    parser.add_argument("--webp", type=Path, metavar="FILE", help="also the first video, or its panel, as moving WebP")
    parser.add_argument("--watch", action="store_true",
                        help="show the episodes live in a window, with the instrument panel, and write nothing")
    parser.add_argument("--grid", action="store_true", help="in many winds and gravities: grid.json and grid.png")
    parser.add_argument("--sample", action="store_true", help="sample actions instead of taking the likeliest")
    parser.add_argument("--output", type=Path, help="folder of report.json and videos/; default: in the run's folder")
    parser.add_argument("overrides", nargs="*", metavar="env.key=value",
                        help=f"of {ENV_ID} the weather: {', '.join(CALM)}; of any other environment: options")
    args = parser.parse_intermixed_args(argv)
    if args.watch and (args.grid or args.webp or args.output or args.videos != parser.get_default("videos")):
        parser.error("--watch writes nothing: no --videos, --webp, --grid or --output")
    if args.grid and (args.panel or args.webp or args.overrides or args.videos != parser.get_default("videos")):
        parser.error("--grid has a weather of its own, and no videos")
    if (args.panel or args.webp) and not args.videos:
        parser.error("--panel and --webp need --videos of 1 or more")
    checkpoint = args.checkpoint or default_checkpoint()
    torch.set_num_threads(min(torch.get_num_threads(), cores_for(SINGLE_PROCESS)))  # a container may allow fewer
    with one_line("evaluate.py", hint="; --output names another folder"):
        policy, config, file = load_policy(checkpoint)
        config = in_weather(config, args.overrides)
        if args.watch:
            from machinery.watch import watch  # and matplotlib with it

            watch(policy, config, play, range(args.seed, args.seed + args.episodes), args.seed if args.sample else None)
            return
        output = args.output
        if output is None:
            folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
            output = folder / "evaluation"
        if args.grid:
            if config.env.id != ENV_ID:
                raise ConfigError(f"--grid has the weathers of {ENV_ID}, not of {config.env.id}")
            evaluate_grid(policy, config, checkpoint, output, args.episodes, args.seed, args.sample)
            print(f"written: {output / 'grid.json'}, {output / 'grid.png'}")
            return
        evaluate(
            policy, config, checkpoint, output, args.episodes, args.seed, min(args.videos, args.episodes), args.sample,
            panel=args.panel)
    filmed = any((output / "videos").glob("*.mp4"))
    print(f"  written  {output / 'report.json'}" + (f", {output / 'videos'}" if args.videos and filmed else ""))
    if args.webp:
        name = f"seed-{args.seed}-panel.mp4" if args.panel else f"seed-{args.seed}.mp4"
        with one_line("evaluate.py"):
            write_webp(output / "videos" / name, args.webp)
        print(f"           {args.webp}")


if __name__ == "__main__":
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    main()
