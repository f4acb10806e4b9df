"""What each policy costs: parameters, multiply-adds per decision, decisions per second chosen and learned from.

    python benchmarks/policies.py [configs/cnn.yaml ...] [--seconds 5]

The policies see the same frames of random play, one lander's successive ones sharing frames as in training. "Chosen" is
`look` and `forward` for 32 landers at once on one thread, as while collecting; "learned from" is one forward and
backward pass over minibatches of 256 decisions on all threads, of which an update makes ppo.update_epochs.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from breakdown import rate

from checkpoint import build_policy
from config import load_config
from envs import NUM_ACTIONS, make_vector_env
from publish import multiply_adds

CONFIGS = Path(__file__).parent.parent / "configs"
DECISIONS, LANDERS, MINIBATCH = 64, 32, 256


def random_play(config):
    """Frame stacks of LANDERS landers over DECISIONS decisions, uint8 (T, N, K, H, W)."""
    settings = config.env.model_dump() | {"num_envs": LANDERS, "num_workers": 2}
    envs, rng = make_vector_env(seed=0, **settings), np.random.default_rng(0)
    frames = [envs.reset()[0].copy()]
    while len(frames) < DECISIONS:
        frames.append(envs.step(rng.integers(NUM_ACTIONS, size=envs.action_space.shape))[0].copy())
    envs.close()
    return torch.from_numpy(np.stack(frames)).flatten(1, 2)


def measure(path, seconds):
    config = load_config(path)
    torch.manual_seed(0)
    policy, frames, stack = build_policy(config), random_play(config), config.env.frame_stack
    policy.calibrate(frames.flatten(0, 1)[:: len(frames)])
    newest = frames.chunk(stack, dim=2)[-1]  # (T, N, C, H, W)
    with torch.no_grad():
        looked = [policy.look(row) for row in newest]
    seen = {key: torch.cat([row[key] for row in looked]) for key in looked[0]}  # (T * N, ...)
    rows = torch.arange(stack) + torch.arange(DECISIONS - stack + 1)[:, None]  # (D, S): successive stacks share rows
    stacks = (rows[:, None] * LANDERS + torch.arange(LANDERS)[:, None]).flatten(0, 1)  # (D * N, S)
    segments = stacks.unflatten(0, (-1, LANDERS)).transpose(0, 1).flatten(0, 1)  # one lander's decisions together
    batches = segments.split(MINIBATCH)

    def choose(step):
        fresh = policy.look(newest[step + stack - 1])
        for key, tensor in fresh.items():
            seen[key][(step + stack - 1) * LANDERS :][:LANDERS] = tensor
        return policy(seen, stacks[step * LANDERS :][:LANDERS])

    def learn():
        logits, value = policy(seen, batches[0])
        policy.zero_grad()
        (logits.square().mean() + value.square().mean()).backward()

    operations = multiply_adds(policy, *frames.shape[-2:])
    policy.train()
    learned = MINIBATCH * rate(learn, seconds)
    policy.eval()
    torch.set_num_threads(1)
    with torch.no_grad():
        for step in range(DECISIONS - stack):  # fill the memory of embeddings
            choose(step)
        chosen = LANDERS * rate(lambda: choose(DECISIONS - stack), seconds)
    return sum(p.numel() for p in policy.parameters()), operations, chosen, learned


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = [CONFIGS / f"{name}.yaml" for name in ("cnn", "temporal_resnet", "transformer")]
    parser.add_argument("configs", nargs="*", type=Path, default=defaults)
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print("| config | parameters | multiply-adds per decision | chosen per second | learned from per second |")
    print("| --- | --- | --- | --- | --- |")
    for path in args.configs:
        torch.set_num_threads(threads)
        parameters, operations, chosen, learned = measure(path, args.seconds)
        row = f"{parameters / 1e6:.2f} M | {operations / 1e6:.1f} M | {chosen:,.0f} | {learned:,.0f}"
        print(f"| {path.stem} | {row} |", flush=True)


if __name__ == "__main__":
    main()
