"""Scores a policy on seeded episodes of the unmodified LunarLander-v3 and records landing videos.

    python evaluate.py                                        # the newest run's best; with no run yet, the shipped one
    python evaluate.py --checkpoint results/cnn --episodes 100 --seed 1000000 --videos 5
    python evaluate.py --checkpoint runs/NAME --sample --output somewhere
    python evaluate.py --checkpoint results/cnn --episodes 1 --videos 1 --panel   # what goes on inside it

Episode i uses seed + i; training never uses seeds from 1,000,000 on. The policy sees the frames of
`gym.make("LunarLander-v3", render_mode="rgb_array")`, rendered once per physics step, and nothing else.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no error

import argparse
import errno
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from tqdm import tqdm

from checkpoint import CheckpointError, load_policy, newest_run, write_atomically
from config import ConfigError
from envs import EVALUATION_SEED, FPS, OUTCOMES, VIEWPORT_H, VIEWPORT_W, Lander, RenderedLander
from tracking import Outlet, first_line

SOLVED = 200  # return from which gymnasium calls an episode a solution
MAX_LANDERS = 50  # episodes played side by side; bounds memory


@torch.no_grad()
def play(policy, env_config, seeds, sample_seed=None, lander_class=Lander, recorder=None, progress=None):
    """Play one episode per seed, many side by side so that the policy sees them as one batch.

    Greedy, or, with sample_seed, actions sampled from generators seeded with (sample_seed, episode's seed).
    A VideoRecorder is told when an episode begins, what is decided in it, and when it ends. Returns (returns, lengths,
    outcomes), arrays in the order of `seeds`.
    """
    policy.eval()
    device = next(policy.parameters()).device
    settings = env_config.model_dump(include={"frame_skip", "frame_stack", "shrink_factor", "color"})
    waiting, results, playing = list(enumerate(seeds)), [None] * len(seeds), []

    def begin(lander):
        if not waiting:
            return
        index, seed = waiting.pop(0)
        if recorder:
            recorder.begin(index, lander)
        rng = None if sample_seed is None else np.random.default_rng([sample_seed, seed])
        playing.append((lander, index, lander.reset(seed), rng))

    for _ in range(min(MAX_LANDERS, len(seeds))):
        begin(lander_class(**settings))
    while playing:
        frames = torch.from_numpy(np.stack([frames for _, _, frames, _ in playing])).to(device)
        logits, values = policy(*policy.see(frames))
        probabilities = logits.double().softmax(-1).cpu().numpy()
        batch, playing = playing, []
        for (lander, index, frames, rng), p, value in zip(batch, probabilities, values.tolist(), strict=True):
            action = int(p.argmax()) if rng is None else int(rng.choice(len(p), p=p / p.sum()))
            if recorder:
                recorder.decide(index, lander, frames, p, value, action)
            frames, _, terminated, truncated = lander.step(action)
            if not (terminated or truncated):
                playing.append((lander, index, frames, rng))
                continue
            results[index] = lander.episode_return, lander.episode_length, lander.outcome()
            if recorder:
                recorder.end(index, lander)
            begin(lander)
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


def summarize(returns, lengths, outcomes):
    """The part of a report that the episodes determine."""
    return {
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_ci95": confidence_interval(returns),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "solved_rate": float((returns >= SOLVED).mean()),
        "landed_rate": float((outcomes == OUTCOMES.index("rest")).mean()),
        "length_mean": float(lengths.mean()),
        "env_frames": int(lengths.sum()),
        "returns": [float(value) for value in returns],
    }


def evaluate(policy, config, checkpoint, output, episodes=100, seed=EVALUATION_SEED, videos=0, sample=False,
             report_name="report.json", video_name="seed-{seed}", panel=False):
    """Score `policy`, write the report and the videos of the first `videos` episodes under `output`; the report."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    make_panel = None
    if panel:
        from panel import Panel  # and matplotlib with it

        def make_panel(episode):
            return Panel(policy, config, f"{config.model.name}, {'sampled' if sample else 'greedy'}, {episode}")

    recorder = VideoRecorder(output / "videos", videos, seed, video_name, make_panel)
    start = time.perf_counter()
    quiet = not config.tracking.progress or None  # None: only where the output is no terminal
    with recorder, tqdm(total=episodes, desc="evaluating", unit="episode", disable=quiet, leave=False) as progress:
        results = play(
            policy, config.env, range(seed, seed + episodes), sample_seed=seed if sample else None,
            lander_class=RenderedLander, recorder=recorder, progress=progress)
    report = {
        "checkpoint": str(checkpoint),
        "policy": config.model.name,
        "mode": "sampled" if sample else "greedy",
        "episodes": episodes,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        **summarize(*results),
    }
    try:
        write_atomically(output / report_name, (json.dumps(report, indent=2) + "\n").encode())
    except OSError:
        print_report(report)  # a full disk must not cost the score
        raise
    return report


class VideoRecorder:
    """Writes the first `count` episodes as H.264 files, frame by frame while they are played.

    `name` is that of each file, with {seed} where the episode's shall stand. `make_panel`, if given, makes the Panel of
    an episode from its title; what it shows is filmed beside, as NAME-panel.mp4.
    A missing or failing encoder, or a failing panel, costs the videos, never the score: it is reported once, and
    playing goes on.
    """

    def __init__(self, folder, count, seed, name="seed-{seed}", make_panel=None):
        self.folder, self.count, self.seed, self.name, self.make_panel = Path(folder), count, seed, name, make_panel
        self.paths, self.failure, self.panel_failure = [], None, None
        self.writers, self.films = {}, {}  # by index of the episode

    def __enter__(self):
        if self.count:
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exception):
        for index in list(self.writers):
            self._close(index)
        for path in self.paths if exception[0] is None else ():
            try:
                imageio_ffmpeg.count_frames_and_secs(path)  # the encoder does not tell when a full disk cut it off
            except (OSError, RuntimeError):
                path.unlink(missing_ok=True)
                if not (self.panel_failure and path.stem.endswith("-panel")):  # of which it has been told
                    self._fail(OSError(f"{path} is not whole"))

    def begin(self, index, lander):
        lander.on_frame = None
        if index >= self.count or self.failure:
            return
        name = self.name.format(seed=self.seed + index)
        try:
            send = self._open(index, f"{name}.mp4", VIEWPORT_W, VIEWPORT_H)
        except (OSError, RuntimeError) as error:
            return self._fail(error)
        if self.make_panel:
            with self._panel_trouble(index):
                panel = self.make_panel(f"seed {self.seed + index}")
                self.films[index] = PanelFilm(panel, self._open(index, f"{name}-panel.mp4", panel.width, panel.height))

        def on_frame(frame):
            try:
                send(frame)
            except (OSError, StopIteration) as error:
                lander.on_frame = None
                self._fail(error)
            with self._panel_trouble(index) as film:
                if film:
                    film.show(frame)

        lander.on_frame = on_frame

    def decide(self, index, lander, frames, probabilities, value, action):
        with self._panel_trouble(index) as film:
            if film:
                film.panel.decide(frames, probabilities, value, action, lander.episode_return, lander.episode_length)

    def end(self, index, lander):
        with self._panel_trouble(index) as film:
            if film:
                outcome = OUTCOMES[lander.outcome()].replace("_", " ")
                film.panel.end(lander.episode_return, lander.episode_length, outcome)
                film.show(None)
        self.films.pop(index, None)
        self._close(index)

    def _open(self, index, name, width, height):
        """A function that takes the frames, uint8 (height, width, 3), of a new file of episode `index`."""
        path = self.folder / name
        # Nothing is scaled, as all sides are multiples of 8; yuv420p is what browsers play.
        writer = imageio_ffmpeg.write_frames(
            str(path), (width, height), fps=FPS, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=8,
            output_params=["-movflags", "+faststart"])
        writer.send(None)
        self.writers.setdefault(index, []).append(writer)
        self.paths.append(path)
        return lambda frame: writer.send(np.ascontiguousarray(frame))

    def _close(self, index):
        """End the encoders of an episode; each takes a hundred megabytes while it lives."""
        for writer in self.writers.pop(index, ()):
            try:
                writer.close()
            except OSError as error:
                self._fail(error)

    @contextmanager
    def _panel_trouble(self, index):
        """Gives the episode's PanelFilm, or None; whatever goes wrong with it ends it."""
        try:
            yield self.films.get(index)
        except Exception as error:
            self.films.pop(index, None)
            if not self.panel_failure:
                print(f"no panel: {first_line(error)}; scores are not affected", file=sys.stderr)
            self.panel_failure = error

    def _fail(self, error):
        if not self.failure:
            self.failure = error
            print(f"no videos: the encoder failed ({first_line(error)}); scores are not affected", file=sys.stderr)


class PanelFilm:
    """Films a Panel. Each frame waits for the next, so that it is shown beside the decision that was made on it."""

    def __init__(self, panel, send):
        self.panel, self.send, self.waiting = panel, send, None

    def show(self, frame):
        if self.waiting is not None:
            self.send(self.panel.picture(self.waiting))
        self.waiting = None if frame is None else frame.copy()


def write_gif(video, output, width=450, fps=25):
    """A video as an endlessly repeating GIF; OSError if the encoder fails."""
    filters = f"fps={fps},scale={width}:-1:flags=lanczos,split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"
    _encode(video, output, "-vf", filters)


def write_webp(video, output, fps=12.5, hold=2):
    """A video as an endlessly repeating WebP that rests at its end for `hold` seconds; OSError if the encoder fails."""
    filters = f"fps={fps},tpad=stop_mode=clone:stop_duration={hold}"
    _encode(video, output, "-vf", filters, "-codec:v", "libwebp_anim", "-quality", "60", "-loop", "0", "-f", "webp")


def _encode(video, output, *options):
    try:
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, first_line(error), str(output)) from error
    command = [ffmpeg, "-y", "-loglevel", "error", "-i", str(video), *options, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["the encoder failed"]
        raise OSError(errno.EIO, reason[0], str(output))


def print_report(report):
    low, high = report["return_ci95"]
    rows = [
        ("policy", f"{report['policy']}, {report['mode']}  ({report['checkpoint']})"),
        ("episodes", f"{report['episodes']}, seeds {report['seed']} to {report['seed'] + report['episodes'] - 1}"),
        ("return", f"{report['return_mean']:.1f} ± {report['return_std']:.1f}   95% interval of the mean "
                   f"{low:.1f} to {high:.1f}   range {report['return_min']:.1f} to {report['return_max']:.1f}"),
        ("solved", f"{100 * report['solved_rate']:.0f}% with a return of {SOLVED} or more"),
        ("landed", f"{100 * report['landed_rate']:.0f}% end at rest, {report['length_mean']:.0f} steps on average"),
        ("took", f"{report['seconds']:.0f} s for {report['env_frames']:,} rendered frames"),
    ]
    print("\n".join(f"{key:>9}  {value}" for key, value in rows))


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
    parser.add_argument("--sample", action="store_true", help="sample actions instead of taking the likeliest")
    parser.add_argument("--output", type=Path, help="folder of report.json and videos/; default: in the run's folder")
    args = parser.parse_args(argv)
    if (args.panel or args.webp) and not args.videos:
        parser.error("--panel and --webp need --videos of 1 or more")
    checkpoint = args.checkpoint or default_checkpoint()
    try:
        policy, config, file = load_policy(checkpoint)
        output = args.output
        if output is None:
            folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
            output = folder / "evaluation"
        report = evaluate(
            policy, config, checkpoint, output, args.episodes, args.seed, min(args.videos, args.episodes), args.sample,
            panel=args.panel)
    except (CheckpointError, ConfigError) as error:
        sys.exit(f"evaluate.py: {error}")
    except OSError as error:
        sys.exit(f"evaluate.py: {error.filename}: {error.strerror}; --output names another folder")
    print_report(report)
    filmed = any((output / "videos").glob("*.mp4"))
    print(f"  written  {output / 'report.json'}" + (f", {output / 'videos'}" if args.videos and filmed else ""))
    if args.webp:
        try:
            write_webp(output / "videos" / f"seed-{args.seed}{'-panel' * args.panel}.mp4", args.webp)
        except OSError as error:
            sys.exit(f"evaluate.py: {args.webp}: {error.strerror}")
        print(f"           {args.webp}")


if __name__ == "__main__":
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    main()
