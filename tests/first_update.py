"""Started by test_distributed.py, under torchrun or alone: one update on given rollouts, its weights and metrics.

    [torchrun ... --nproc_per_node=2] tests/first_update.py FILE

Alone, it learns from the rollouts of both processes as one, in minibatches of the same decisions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from envs import make_vector_env
from machinery.checkpoint import build_policy
from machinery.config import load_config
from machinery.processes import Processes
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
        envs = make_vector_env(LANDERS, 1, seed=1, first_env=rank * LANDERS, **CONFIG.env.settings())
        frames = torch.from_numpy(envs.reset()[0])
        if rank == 0:
            frames = torch.from_numpy(envs.step(np.zeros(LANDERS, int))[0])
            policy.calibrate(frames)
        frame_store = policy.preprocess(frames.chunk(CONFIG.env.frame_stack, dim=1)[-1])
        rollout = Rollout.empty(
            CONFIG.ppo.num_steps, CONFIG.env.frame_stack, frame_store, torch.zeros(LANDERS, dtype=torch.int64))
        collect(envs, policy, rollout, frames, 0.01, FP32)
        envs.close()
        rollout.rewards += 0.03 * rank  # so that advantages normalised by each process alone would differ
        found.append(rollout)
    return policy, found


def joined(rollouts):
    """The rollouts of several processes as one of all their landers, side by side."""
    fields = {name: torch.cat([getattr(rollout, name) for rollout in rollouts], dim=1)
              for name in vars(rollouts[0]) if name != "frame_store"}
    first = rollouts[0]
    rows = len(next(iter(first.frame_store.values())))  # of each store; the stores are laid one behind the other
    store = {key: torch.cat([rollout.frame_store[key] for rollout in rollouts]) for key in first.frame_store}
    fields["frame_ids"] = torch.cat([rollout.frame_ids + i * rows for i, rollout in enumerate(rollouts)], dim=1)
    return Rollout(frame_store=store, **fields)


def same_minibatches(count, generator):
    """In place of torch.randperm: minibatch m holds what minibatch m of each process holds."""
    order = randperm(count // PROCESSES, generator=generator)
    step, lander = order // LANDERS, order % LANDERS
    own = [step * PROCESSES * LANDERS + rank * LANDERS + lander for rank in range(PROCESSES)]
    return torch.cat([part for parts in zip(*(o.chunk(MINIBATCHES) for o in own), strict=True) for part in parts])


def main():
    torch.set_num_threads(1)
    processes = Processes.launched()
    processes.join()
    policy, found = rollouts()
    generator = torch.Generator().manual_seed(5)
    if processes.size == 1:
        rollout, torch.randperm = joined(found), same_minibatches
    else:
        rollout = found[processes.rank]
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-5)
    compute_advantages(rollout, 0.99, 0.95)
    learner = processes.parallel(policy, rollout[torch.zeros(1, dtype=torch.int64)])
    metrics = update(learner, optimizer, rollout, CONFIG.ppo, 0.01, FP32, generator, processes)
    torch.save(
        {"policy": policy.state_dict(), "metrics": metrics}, f"{sys.argv[1]}-{processes.size}-{processes.rank}")
    processes.leave()


if __name__ == "__main__":
    main()
