"""What a policy knows of the state, though nobody told it: how well a line through its hidden layer tells the state.

    python benchmarks/readout.py results/cnn results/transformer results/cnn_learned_eye
    python benchmarks/readout.py runs/NAME/checkpoints/*.ckpt --plot readout.png   # over training: tracking.keep=1000

The state vector is what the policies do without; here it is the measure. A ridge regression is fitted to the hidden
layer's units in 40 episodes, and its R2 measured in 20 others: 1 is all that there is to know, 0 no more than the mean,
below 0 is worse than that. Policies with the same settings of `env` see the same play: gymnasium's hand-written
controller, of whose actions three in ten are replaced by random ones; in another environment than LunarLander-v3,
random play. Frames are `render()`'s own.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from gymnasium.envs.box2d.lunar_lander import heuristic
from yardstick import LastObservation

from frames import RenderedEnv
from lander import RenderedLander
from machinery.checkpoint import load_policy, read_checkpoint
from machinery.drawing import Figure
from machinery.errors import UserError, one_line
from plot import save_figure
from task import ENV_ID

FITTED, MEASURED, FIRST_SEED = 40, 20, 3_000_000  # episodes, and a seed that no training uses
RANDOM_SHARE, LONGEST = 0.3, 100  # of actions; decisions of an episode, as one that hovers has little new to see
PENALTIES = np.logspace(-4, 2, 13)  # relative to the features' mean variance times the number of decisions
LANDER = {"x": 0, "y": 1, "speed x": 2, "speed y": 3, "angle": 4, "spin": 5}  # places in LunarLander-v3's vector
SIDEWAYS = (0, 2, 4, 5)  # of these, what a mirror turns around


class WithState:
    """Mixed into a RenderedEnv: keeps the newest state vector as env.newest."""

    def make_env(self):
        return LastObservation(super().make_env())


class LanderWithState(WithState, RenderedLander):
    pass


class EnvWithState(WithState, RenderedEnv):
    pass


def play(settings, episodes):
    """(stacks uint8 (T, K, H, W), states float (T, D), episode of each, int (T,)) of the same play for everybody."""
    is_lander = settings["env_id"] == ENV_ID
    env = LanderWithState(**{k: v for k, v in settings.items() if k != "env_id"}) if is_lander else EnvWithState(
        **settings)
    stacks, states, owners = [], [], []
    for episode in range(episodes):
        rng = np.random.default_rng([7, episode])
        stack = env.reset(FIRST_SEED + episode)
        for _ in range(LONGEST):
            stacks.append(stack.copy())
            states.append(env.env.newest)
            owners.append(episode)
            if is_lander and rng.random() >= RANDOM_SHARE:
                action = heuristic(env.env.unwrapped, env.env.newest)
            else:
                count = len(env.task.actions)
                action = rng.uniform(-1, 1, count) if env.task.continuous else int(rng.integers(count))
            stack, _, terminated, truncated = env.step(action)
            if terminated or truncated:
                break
    return np.stack(stacks), np.stack(states).astype(float), np.array(owners)


@torch.no_grad()
def hidden_units(policy, stacks, batch=256):
    """(float (T, F), bool (T,)): the layer that both heads read, and which decisions it saw in the mirror."""
    units, mirrored = [], []
    for part in torch.from_numpy(stacks).split(batch):
        frame_store, frame_ids = policy.preprocess_stacks(part)
        turned = policy.mirrored(frame_store, frame_ids)  # nobody is left of the middle of whole frames
        units.append(policy.hidden(policy.inputs(frame_store, frame_ids, turned).float()))
        mirrored.append(turned)
    return torch.cat(units).double().numpy(), torch.cat(mirrored).numpy()


def ridge(features, targets, penalty):
    """(weights (F, D), intercept (D,)) of the least squares with an L2 penalty (Hoerl & Kennard 1970)."""
    mean, center = features.mean(0), targets.mean(0)
    centered = features - mean
    scale = penalty * len(features) * centered.var(0).mean()
    weights = np.linalg.solve(
        centered.T @ centered + (scale + 1e-12) * np.eye(features.shape[1]), centered.T @ (targets - center))
    return weights, center - mean @ weights


def explained(features, targets, fitted, measured):
    """R2 of each target, (D,), on the rows `measured`, of a ridge regression on the rows `fitted`.

    The penalty is that which is best for the last quarter of `fitted`, when fitted to the rest.
    """
    def r2(rows, weights, intercept):
        error = ((features[rows] @ weights + intercept - targets[rows]) ** 2).sum(0)
        return 1 - error / np.maximum(((targets[rows] - targets[rows].mean(0)) ** 2).sum(0), 1e-12)

    rest, last = np.split(fitted, [len(fitted) * 3 // 4])
    chosen = max(PENALTIES, key=lambda penalty: r2(last, *ridge(features[rest], targets[rest], penalty)).mean())
    return r2(measured, *ridge(features[fitted], targets[fitted], chosen))


def read_out(policy, config, played):
    """{name of a part of the state: R2}."""
    stacks, states, owners = played
    names = LANDER if config.env.id == ENV_ID else {f"state {i}": i for i in range(states.shape[1])}
    units, mirrored = hidden_units(policy, stacks)
    targets = states[:, list(names.values())]
    if config.env.id == ENV_ID:  # a policy that sees a mirror image knows the state of that
        targets[:, SIDEWAYS] *= np.where(mirrored, -1, 1)[:, None]
    fitted, measured = (np.flatnonzero(rows) for rows in (owners < FITTED, owners >= FITTED))
    return dict(zip(names, explained(units, targets, fitted, measured), strict=True))


def draw(frames, results, output):
    """R2 of each part of the state over frames of training."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in results[0]:
        axis.plot(np.array(frames) / 1e6, [result[name] for result in results], marker=".", label=name)
    axis.set(ylim=(-0.1, 1.02), xlabel="environment frames, millions",
             ylabel="R2 of a linear read-out on unseen episodes")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, output)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="runs/NAME, results/NAME or a file of either kind")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="over the frames of training; all must be .ckpt files")
    args = parser.parse_args(argv)
    with one_line("readout.py"):
        if args.plot and any(path.suffix != ".ckpt" for path in args.checkpoints):
            raise UserError("--plot: only .ckpt files tell for how many frames they were trained")
        frames, results, settings = [], [], None
        for path in args.checkpoints:
            policy, config, file = load_policy(path)
            if settings != config.env.settings():  # one play is kept at a time: its frames can take a gigabyte
                if args.plot and settings:
                    raise UserError("--plot: the policies see different frames; a picture is of one run")
                settings = config.env.settings()
                played = play(settings, FITTED + MEASURED)
            result = read_out(policy, config, played)
            if not results or results[-1].keys() != result.keys():  # another environment's state
                print(f"| policy | {' | '.join(result)} |\n{'| --- ' * (1 + len(result))}|")
            print(f"| {path} | {' | '.join(f'{value:.2f}' for value in result.values())} |", flush=True)
            results.append(result)
            if args.plot:
                frames.append(read_checkpoint(file)["counters"]["env_frames"])
        if args.plot:
            draw(frames, results, args.plot)


if __name__ == "__main__":
    main()
