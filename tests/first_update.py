"""Started by test_distributed.py, under torchrun or alone: one update on given rollouts, its weights and metrics.

    [torchrun ... --nproc_per_node=2] tests/first_update.py FILE

Alone, it learns from the rollouts of both processes as one, in minibatches of the same decisions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from checkpoint import build_policy
from config import load_config
from distributed import World
from envs import make_vector_env
from train import Rollout, collect, compute_advantages, update

PROCESSES, LANDERS, MINIBATCHES = 2, 4, 4
CONFIG = load_config(None, [
    f"env.num_envs={LANDERS}", "env.num_workers=1", "ppo.num_steps=16", f"ppo.num_minibatches={MINIBATCHES}",
    "model.features=32"])
FP32 = torch.autocast("cpu", enabled=False)
randperm = torch.randperm


def rollouts():
    """The calibrated policy, some frames, and what it collects with the landers of each of both processes."""
    torch.manual_seed(0)
    policy, found = build_policy(CONFIG), []
    for rank in range(PROCESSES):
        envs = make_vector_env(seed=1, first_lander=rank * LANDERS, **CONFIG.env.model_dump())
        frames = torch.from_numpy(np.array(envs.reset()[0])).flatten(0, 1)
        if rank == 0:
            moved = torch.from_numpy(envs.step(np.zeros((1, LANDERS), int))[0]).flatten(0, 1)
            policy.calibrate(moved)
            frames = moved.clone()
        looked = policy.look(frames.chunk(CONFIG.env.frame_stack, dim=1)[-1])
        rollout = Rollout.empty(CONFIG.ppo.num_steps, LANDERS, CONFIG.env.frame_stack, looked)
        collect(envs, policy, rollout, frames, 0.01, FP32)
        envs.close()
        rollout.rewards += 0.03 * rank  # so that advantages normalised by each process alone would differ
        found.append(rollout)
    return policy, frames, found


def joined(rollouts):
    """The rollouts of several processes as one of all their landers, side by side."""
    def side_by_side(name):
        tensors = [getattr(rollout, name) for rollout in rollouts]
        return torch.cat(tensors, dim=0 if tensors[0].dim() == 1 else 1)

    names = ("actions", "log_probs", "values", "rewards", "terminated", "truncated", "final_values", "next_value")
    total, each = len(rollouts) * LANDERS, LANDERS
    stacks = [rollout.stacks // each * total + rollout.stacks % each + i * each for i, rollout in enumerate(rollouts)]
    seen = {key: torch.cat([rollout.seen[key] for rollout in rollouts], dim=1) for key in rollouts[0].seen}
    return Rollout(seen=seen, stacks=torch.cat(stacks, dim=1), **{name: side_by_side(name) for name in names})


def same_minibatches(count, generator):
    """In place of torch.randperm: minibatch m holds what minibatch m of each process holds."""
    order = randperm(count // PROCESSES, generator=generator)
    step, lander = order // LANDERS, order % LANDERS
    own = [step * PROCESSES * LANDERS + rank * LANDERS + lander for rank in range(PROCESSES)]
    return torch.cat([part for parts in zip(*(o.chunk(MINIBATCHES) for o in own), strict=True) for part in parts])


def main():
    torch.set_num_threads(1)
    world = World.launched()
    world.join()
    policy, frames, found = rollouts()
    generator = torch.Generator().manual_seed(5)
    if world.size == 1:
        rollout, torch.randperm = joined(found), same_minibatches
    else:
        rollout = found[world.rank]
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-5)
    advantages, returns = compute_advantages(rollout, 0.99, 0.95)
    learner = world.parallel(policy, frames)
    metrics = update(
        learner, optimizer, rollout, advantages, returns, CONFIG.ppo, 0.01, FP32, generator, world)
    torch.save({"policy": policy.state_dict(), "metrics": metrics}, f"{sys.argv[1]}-{world.size}-{world.rank}")
    world.leave()


if __name__ == "__main__":
    main()
