"""What each policy costs: parameters, multiply-adds per decision, decisions per second chosen and learned from.

    python benchmarks/policies.py [configs/cnn.yaml ...] [--seconds 5]

The policies see the same frames of random play, one lander's successive ones sharing frames as in training. "Chosen" is
`preprocess` and `forward` for 32 landers at once on one thread, as while collecting; "learned from" is one forward and
backward pass over a minibatch of 256 decisions, in shuffled segments as in training, on all threads, of which an update
makes ppo.update_epochs.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from breakdown import rate

from envs import make_vector_env
from machinery.checkpoint import build_policy
from machinery.config import ConfigError, load_config
from machinery.publish import multiply_adds

CONFIGS = Path(__file__).parent.parent / "configs"
DECISIONS, LANDERS, MINIBATCH = 64, 32, 256  # a segment's length must divide the first and the last


def random_play(config):
    """Frame stacks of LANDERS landers, uint8 (T, N, K, H, W), in which there are DECISIONS whole stacks of others."""
    envs, rng = make_vector_env(LANDERS, 2, seed=0, **config.env.settings()), np.random.default_rng(0)
    frames = [envs.reset()[0].copy()]
    while len(frames) < DECISIONS + config.env.frame_stack - 1:
        frames.append(envs.step(rng.integers(len(config.env.task.actions), size=LANDERS))[0].copy())
    envs.close()
    return torch.from_numpy(np.stack(frames))


def measure(config, seconds):
    torch.manual_seed(0)
    policy, frames, stack = build_policy(config), random_play(config), config.env.frame_stack
    policy.calibrate(frames.flatten(0, 1)[:: len(frames)])
    newest = frames.chunk(stack, dim=2)[-1]  # (T, N, C, H, W)
    with torch.no_grad():
        rows = [policy.preprocess(row) for row in newest]
    frame_store = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}  # (T * N, ...)
    length = config.ppo.segment_length
    rows = torch.arange(stack) + torch.arange(DECISIONS)[:, None]  # (D, S): successive stacks share rows
    frame_ids = rows[:, None] * LANDERS + torch.arange(LANDERS)[:, None]  # (D, N, S)
    segments = frame_ids.transpose(0, 1).reshape(-1, length, stack)  # each of one lander
    minibatch = segments[torch.randperm(len(segments))[: MINIBATCH // length]].flatten(0, 1)

    def choose(step):
        fresh = policy.preprocess(newest[step + stack - 1])
        for key, tensor in fresh.items():
            frame_store[key][(step + stack - 1) * LANDERS :][:LANDERS] = tensor
        return policy(frame_store, frame_ids[step])

    def learn():
        output = policy(frame_store, minibatch)
        policy.zero_grad()
        (output.distribution.logits.square().mean() + output.value.square().mean()).backward()

    operations = multiply_adds(policy, length)
    policy.train()
    learned = MINIBATCH * rate(learn, seconds)
    policy.eval()
    torch.set_num_threads(1)
    with torch.no_grad():
        for step in range(DECISIONS - 1):  # fill the memory of embeddings
            choose(step)
        chosen = LANDERS * rate(lambda: choose(DECISIONS - 1), seconds)
    return sum(p.numel() for p in policy.parameters()), operations, chosen, learned


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = [CONFIGS / f"{name}.yaml" for name in ("cnn", "temporal_resnet", "transformer")]
    parser.add_argument("configs", nargs="*", type=Path, default=defaults)
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    try:
        configs = [(path.stem, load_config(path)) for path in args.configs]
        for name, config in configs:
            if config.env.task.continuous:
                raise ConfigError(f"{name}: continuous actions; this script plays discrete ones")
    except ConfigError as error:
        sys.exit(f"policies.py: {error}")
    threads = torch.get_num_threads()
    print("| config | parameters | multiply-adds per decision | chosen per second | learned from per second |")
    print("| --- | --- | --- | --- | --- |")
    for name, config in configs:
        torch.set_num_threads(threads)
        parameters, operations, chosen, learned = measure(config, args.seconds)
        row = f"{parameters / 1e6:.2f} M | {operations / 1e6:.1f} M | {chosen:,.0f} | {learned:,.0f}"
        print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
