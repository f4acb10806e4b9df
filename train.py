"""PPO from scratch on rendered frames: collect -> advantages -> update, and the loop around them.

    python train.py --config configs/cnn.yaml
    python train.py --config configs/cnn.yaml run.seed=2 ppo.learning_rate=3e-4
    python train.py --resume latest
    torchrun --standalone --nproc_per_node=2 train.py --config configs/cnn.yaml

The algorithm is Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv:1707.06347). In reading order:

    Rollout             the container: T decisions of N landers; rollout[indices] is a minibatch of them
    collect             plays T decisions with each lander; values the last frames of truncated episodes
    compute_advantages  generalised advantage estimation
    ppo_loss            clipped policy loss, value loss, entropy bonus
    update              epochs of shuffled minibatches
    Trainer             policy, optimizer and landers; `iterate` is one round of the above
    train               the loop

machinery/ has what keeps a run safe, seen and repeatable.
"""

import os

# OpenMP's threads spin after a parallel region and would steal the cores from the landers; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loaded; later it saves

import argparse
import copy
import sys
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import nn

from envs import EPISODE_METRICS, WorkerError, make_vector_env
from evaluate import evaluate, play
from machinery.checkpoint import build_policy, load_weights
from machinery.device import autocast, choose_device, cores_for, keep_freed_memory
from machinery.errors import one_line
from machinery.processes import ALONE, Processes
from machinery.run import open_run
from machinery.terminal import Outlet
from models import PolicyError
from plot import draw_run
from task import ACTIONS


@dataclass
class Rollout:
    """T decisions of N landers: what each saw, did and received. As `rollout[indices]`, a minibatch of B of them."""

    frame_store: dict  # of tensors, one row per frame, (rows, ...): what the policy's `preprocess` made of it
    frame_ids: torch.Tensor  # int64 (T, N, S): the rows of frame_store that each decision saw, oldest frame first
    actions: torch.Tensor  # (T, N, ...)
    log_probs: torch.Tensor  # float32 (T, N), log pi(action | frames) when the action was drawn
    values: torch.Tensor  # float32 (T, N)
    next_values: torch.Tensor  # float32 (T, N), value of the frames that followed; see collect for endings
    rewards: torch.Tensor  # float32 (T, N), scaled
    terminated: torch.Tensor  # bool (T, N): the episode ended at this decision; nothing comes after
    truncated: torch.Tensor  # bool (T, N): the episode was cut off at this decision
    advantages: torch.Tensor  # float32 (T, N)
    returns: torch.Tensor  # float32 (T, N), targets of the value function

    @classmethod
    def empty(cls, num_steps, frame_stack, frame_store, actions):
        """Room for num_steps decisions. Examples of one decision of each lander: `preprocess`'s result and actions."""
        n, device = len(actions), next(iter(frame_store.values())).device

        def room(dtype=torch.float32, *shape, rows=num_steps):
            return torch.zeros(rows, n, *shape, dtype=dtype, device=device)

        rows = frame_stack + num_steps  # the stack that the rollout begins with, then a frame after each decision
        made = {
            "frame_store": {k: room(t.dtype, *t.shape[1:], rows=rows).flatten(0, 1) for k, t in frame_store.items()},
            "frame_ids": room(torch.int64, frame_stack), "actions": room(actions.dtype, *actions.shape[1:]),
            "terminated": room(torch.bool), "truncated": room(torch.bool)}
        return cls(**made, **{field.name: room() for field in fields(cls) if field.name not in made})

    def __getitem__(self, indices):
        """The decisions `indices`, int64 (B,), of all T * N in a row: every field (B, ...); the whole frame store."""
        fields = {key: value.flatten(0, 1)[indices] for key, value in vars(self).items() if key != "frame_store"}
        return Rollout(self.frame_store, **fields)


@torch.no_grad()
def collect(envs, policy, rollout, frames, reward_scale, autocast):
    """Play T decisions with the policy's own samples, filling `rollout` in place but for advantages and returns.

    `frames` are the current observations, uint8 (N, K, H, W); returns those after the last decision and a dict:
    the episodes that ended, a list of {name of envs.EPISODE_METRICS: number}, and the physics steps done.
    """
    policy.eval()
    device, (num_steps, num_envs, frame_stack) = rollout.values.device, rollout.frame_ids.shape
    final_values = torch.zeros_like(rollout.values)  # of the last frames of truncated episodes
    episodes, env_frames = [], 0

    def store(row, newest):
        """Keep each lander's newest frame, uint8 (N, C, H, W)."""
        if device.type == "cuda":
            newest = newest.pin_memory()  # the one copy; the GPU fetches it from there by itself
        with autocast:
            for key, tensor in policy.preprocess(newest.to(device, non_blocking=True)).items():
                rollout.frame_store[key][row * num_envs : (row + 1) * num_envs] = tensor

    # Which frames a decision sees. Row r of the store holds one frame per lander: lander n's has the id r * N + n.
    # Example with N = 2 landers and stacks of S = 3. Rows 0, 1, 2 are the stack that the rollout begins with, and row
    # 2 + t is the newest one at decision t. Lander 1 sees ids [1, 3, 5] at decision 0 and [3, 5, 7] at decision 1. If
    # its episode ends with decision 1, row 4 (id 9) is the first frame of the next one, which stands in for those
    # before it: [9, 9, 9] at decision 2, [9, 9, 11] at decision 3.
    ago = torch.arange(frame_stack - 1, -1, -1, device=device)  # (S,), decisions since each frame of a stack
    age = torch.full((num_envs, 1), frame_stack, device=device)  # decisions since the first frame of the episode
    lander = torch.arange(num_envs, device=device)[:, None]

    def decide(t):
        frame_ids = (frame_stack - 1 + t - torch.minimum(ago, age)) * num_envs + lander  # (N, S)
        with autocast:
            return frame_ids, policy(rollout.frame_store, frame_ids)

    for row, older in enumerate(frames.chunk(frame_stack, dim=1)):
        store(row, older)
    for t in range(num_steps):
        rollout.frame_ids[t], output = decide(t)
        if not torch.isfinite(output.distribution.entropy().sum() + output.value.sum()):
            raise FloatingPointError("the policy's logits or values are not finite; stopped before the optimizer")
        rollout.actions[t] = output.distribution.sample()
        rollout.log_probs[t] = output.distribution.log_prob(rollout.actions[t])
        rollout.values[t] = output.value

        observations, rewards, terminated, truncated, info = envs.step(rollout.actions[t].cpu().numpy())
        if not np.isfinite(rewards).all():
            raise FloatingPointError("a reward is not finite; stopped before the optimizer")
        frames = torch.from_numpy(observations)
        store(frame_stack + t, frames.chunk(frame_stack, dim=1)[-1])
        rollout.rewards[t] = torch.from_numpy(rewards).to(rollout.rewards) * reward_scale
        rollout.terminated[t], rollout.truncated[t] = torch.from_numpy(terminated), torch.from_numpy(truncated)
        age = torch.where((rollout.terminated[t] | rollout.truncated[t])[:, None], 0, age + 1)
        if truncated.any():  # the truncation bootstrap: what a cut-off episode would still have brought
            final_frames = torch.from_numpy(info["final_frames"][truncated]).to(device)
            with autocast:
                final_values[t, rollout.truncated[t]] = policy(*policy.preprocess_stacks(final_frames)).value
        env_frames += int(info["env_frames"].sum())
        for n in np.flatnonzero(terminated | truncated):
            episodes.append({key: float(values[n]) for key, values in info["episode"].items()})
    following = torch.cat([rollout.values[1:], decide(num_steps)[1].value[None]])  # (T, N)
    # After an ending it would be that of the next episode. Nothing follows a termination: 0.
    ended = rollout.terminated | rollout.truncated
    rollout.next_values[:] = torch.where(ended, final_values, following)
    return frames, {"episodes": episodes, "env_frames": env_frames}


@torch.no_grad()
def compute_advantages(rollout, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eqs. 11 and 16), in place.

    A_t = delta_t + gamma * lambda * A_{t+1} within an episode, delta_t = r_t + gamma * V(s_{t+1}) - V(s_t); the
    returns, which the value function is to learn, are A_t + V(s_t).
    """
    advantage = torch.zeros_like(rollout.values[0])  # (N,)
    for t in reversed(range(len(rollout.rewards))):
        ended = rollout.terminated[t] | rollout.truncated[t]
        delta = rollout.rewards[t] + gamma * rollout.next_values[t] - rollout.values[t]
        advantage = delta + gamma * gae_lambda * ~ended * advantage
        rollout.advantages[t] = advantage
    rollout.returns[:] = rollout.advantages + rollout.values


def ppo_loss(output, minibatch, ppo, entropy_coef, processes=ALONE):
    """The clipped surrogate objective with value loss and entropy bonus (eqs. 7 and 9), to be minimised.

    output: the models.PolicyOutput for `minibatch`, a Rollout of B decisions. Advantages are normalised over the
    minibatches of all processes. Returns the loss and a dict of detached metrics.
    """
    entropy = output.distribution.entropy().mean()
    logratio = output.distribution.log_prob(minibatch.actions) - minibatch.log_probs
    ratio = logratio.exp()
    advantages = minibatch.advantages
    if ppo.normalize_advantages:
        everyones = processes.all_gather(advantages)
        advantages = (advantages - everyones.mean()) / (everyones.std() + 1e-8)
    clipped = ratio.clamp(1 - ppo.clip_coef, 1 + ppo.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()

    error = (output.value - minibatch.returns) ** 2
    if ppo.value_clip:
        change = (output.value - minibatch.values).clamp(-ppo.clip_coef, ppo.clip_coef)
        error = torch.max(error, (minibatch.values + change - minibatch.returns) ** 2)
    value_loss = 0.5 * error.mean()

    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            # The estimator k3 of J. Schulman, "Approximating KL divergence" (2020): unbiased, never negative.
            "approx_kl": (ratio - 1 - logratio).mean(),
            "clip_fraction": ((ratio - 1).abs() > ppo.clip_coef).float().mean(),
        }
    return policy_loss + ppo.value_coef * value_loss - entropy_coef * entropy, metrics


def explained_variance(values, returns):
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant; nan if returns are equal."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else float("nan")


def update(policy, optimizer, rollout, ppo, entropy_coef, autocast, generator, processes=ALONE):
    """update_epochs passes over the rollout in shuffled minibatches. Returns metrics, means over all minibatches.

    With many processes, `policy` averages their gradients, and metrics are those of all their minibatches.
    """
    policy.train()
    # What is shuffled are segments: successive decisions of one lander, which share most of their frames. Example with
    # T = 4, N = 2, segments of 2, decisions numbered t * N + n: [0, 2], [1, 3] of landers 0 and 1, then [4, 6], [5, 7].
    num_envs, device = rollout.values.shape[1], rollout.values.device
    decisions = torch.arange(rollout.values.numel(), device=device).view(-1, ppo.segment_length, num_envs)
    segments = decisions.transpose(1, 2).reshape(-1, ppo.segment_length)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    sums, count = {}, 0
    for _ in range(ppo.update_epochs):
        epoch_kl, order = 0.0, torch.randperm(len(segments), generator=generator).to(device)
        for indices in segments[order].flatten().chunk(ppo.num_minibatches):
            minibatch = rollout[indices]
            with autocast:
                output = policy(minibatch.frame_store, minibatch.frame_ids, minibatch)
            loss, metrics = ppo_loss(output, minibatch, ppo, entropy_coef, processes)
            for name, auxiliary in output.losses.items():
                loss, metrics[f"{name}_loss"] = loss + auxiliary, auxiliary.detach()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(parameters, ppo.max_grad_norm).detach()
            if not torch.isfinite(metrics["grad_norm"] + loss):
                raise FloatingPointError(
                    f"loss {loss.item()}, gradient norm {metrics['grad_norm'].item()}; stopped before the optimizer")
            optimizer.step()
            count += 1
            epoch_kl += float(metrics["approx_kl"]) / ppo.num_minibatches
            for key, metric in metrics.items():
                sums[key] = sums.get(key, 0.0) + float(metric)
        if ppo.target_kl is not None and processes.mean(epoch_kl) > ppo.target_kl:
            break
    if not all(torch.isfinite(tensor).all() for tensor in policy.state_dict().values()):
        raise FloatingPointError("the weights are not finite; stopped after the optimizer")
    means = {key: processes.mean(total / count) for key, total in sums.items()}
    values, returns = processes.all_gather(rollout.values), processes.all_gather(rollout.returns)
    return means | {"explained_variance": explained_variance(values, returns)}


def schedule(ppo, env_frames, late):
    """Learning rate and entropy coefficient now: linear warm-up and annealing, then the late stage.

    The late stage begins once the policy lands well. It needs small steps then, and no bonus for trying other actions.
    """
    left = max(1 - env_frames / ppo.total_frames, 0) if ppo.anneal else 1
    warm = min((env_frames + 1) / ppo.warmup_frames, 1) if ppo.warmup_frames else 1
    return (
        ppo.learning_rate * left * warm * (ppo.late_learning_rate if late else 1),
        ppo.entropy_coef * (ppo.late_entropy if late else 1))


def episode_means(episodes):
    """{metric: mean} of the EPISODE_METRICS; before the first episode has ended, a rate is 0 and any other mean nan."""
    if not episodes:
        return {key: 0.0 if key.endswith("_rate") else float("nan") for key in EPISODE_METRICS}
    return {key: float(np.mean([episode.get(key, np.nan) for episode in episodes])) for key in EPISODE_METRICS}


class Trainer:
    """Policy, optimizer and landers, and how far they have come; machinery.run.Run has all else of a run."""

    def __init__(self, config, state=None, processes=ALONE):
        """state: the dict in a checkpoint, to go on from it."""
        keep_freed_memory()
        self.config, self.processes, env, seed = config, processes, config.env, config.run.seed
        self.device = choose_device(config.run.device, processes)
        self.num_threads = config.run.num_threads or cores_for(processes)
        self.autocast = autocast(self.device, config.run.bf16)
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(processes.seed(seed))  # shuffles minibatches
        self.policy = build_policy(config)
        if not state:
            self.policy.load_pretrained()
        self.policy.to(self.device)
        self.optimizer = torch.optim.Adam(
            self.policy.parameter_groups(), lr=config.ppo.learning_rate, eps=config.ppo.adam_eps)
        if processes.rank:
            torch.manual_seed(processes.seed(seed))  # draws actions
        self.counters = {"env_frames": 0, "updates": 0, "late": False}
        self.recent = deque(maxlen=100)  # {metric: number} of the last episodes
        self.between_updates = True  # else the weights are those of an update that is not done
        self.envs = self._make_envs()
        if state:
            self._restore(state)
        else:
            self.frames = torch.from_numpy(self.envs.reset()[0])
            self._calibrate()
        newest = self.frames.chunk(env.frame_stack, dim=1)[-1].to(self.device)
        with self.autocast:
            frame_store = self.policy.preprocess(newest)
        actions = torch.from_numpy(np.zeros(self.envs.action_space.shape, self.envs.action_space.dtype))
        self.rollout = Rollout.empty(config.ppo.num_steps, env.frame_stack, frame_store, actions)
        self.learner = processes.parallel(self.policy, self.rollout[torch.zeros(1, dtype=torch.int64)])

    def _make_envs(self):
        """This process's landers. Over all processes they are those that one process with as many would play."""
        env = self.config.env
        return make_vector_env(
            seed=self.config.run.seed, first_env=self.processes.rank * env.num_envs, **env.model_dump())

    def _calibrate(self, decisions=20):
        """Let the policy see some frames of random play, for what it can learn from frames alone."""
        seen = []
        for _ in range(decisions):
            actions = torch.randint(len(ACTIONS), (self.config.env.num_envs,), generator=self.generator)
            self.frames = torch.from_numpy(self.envs.step(actions.numpy())[0])
            seen.append(self.frames.clone())
        self.policy.calibrate(torch.cat(seen).to(self.device))

    def iterate(self):
        """Collect, compute advantages, update; the metrics of this iteration."""
        ppo, counters, start = self.config.ppo, self.counters, time.perf_counter()
        learning_rate, entropy_coef = schedule(ppo, counters["env_frames"], counters["late"])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        torch.set_num_threads(1)  # while the workers have the cores
        self.frames, stats = collect(self.envs, self.policy, self.rollout, self.frames, ppo.reward_scale, self.autocast)
        torch.set_num_threads(self.num_threads)
        collected = time.perf_counter()
        compute_advantages(self.rollout, ppo.gamma, ppo.gae_lambda)
        self.between_updates = False
        learned = update(self.learner, self.optimizer, self.rollout, ppo, entropy_coef, self.autocast, self.generator,
                         self.processes)
        end = time.perf_counter()

        everyones = self.processes.all_gather_object(stats)
        env_frames = sum(stats["env_frames"] for stats in everyones)
        self.recent.extend(episode for stats in everyones for episode in stats["episodes"])
        counters["env_frames"] += env_frames
        counters["updates"] += 1
        episodes = episode_means(self.recent)
        if ppo.late_return is not None and len(self.recent) == self.recent.maxlen:
            counters["late"] |= episodes["return_mean"] >= ppo.late_return
        return {
            **{f"rollout/{key}": value for key, value in episodes.items()},
            **{f"update/{key}": value for key, value in learned.items()},
            "schedule/learning_rate": learning_rate,
            "schedule/entropy_coef": entropy_coef,
            "speed/frames_per_second": env_frames / (end - start),
            "speed/collect_seconds": collected - start,
            "speed/update_seconds": end - collected,
        }

    def snapshot(self):
        """All that a bit-exact continuation needs besides weights and optimizer, taken between two iterations.

        Of many processes each has its own landers and random numbers. There the snapshot holds weights and optimizer,
        too: the first process must be able to save them when another has died in the middle of the next update.
        """
        own = {
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
            "landers": copy.deepcopy(self.envs.state),
        }
        shared = {"counters": dict(self.counters), "recent": list(self.recent)}
        if self.processes.size > 1 and self.processes.rank == 0:
            shared |= copy.deepcopy(self.learned())
        snapshot = shared | own | {"peers": self.processes.all_gather_object(own)[1:]}
        self.between_updates = True
        return snapshot

    def learned(self):
        return {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _restore(self, state):
        load_weights(self.policy, state["policy"], state["source"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.counters |= {key: state["counters"][key] for key in self.counters}
        self.recent.extend(state["recent"])
        self._rewind([state, *state.get("peers", [])][self.processes.rank])

    def _rewind(self, snapshot):
        """Put landers and random numbers where they were at `snapshot`."""
        self.frames = torch.from_numpy(self.envs.rewind(snapshot["landers"]))
        self.generator.set_state(snapshot["generator"])
        torch.set_rng_state(snapshot["torch_rng"])
        if snapshot["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(snapshot["cuda_rng"][0], self.device)

    def restart_workers(self, snapshot):
        """New workers for failed ones. A rollout changes no weights, so `snapshot`, from before it, is enough."""
        self.envs.close()
        self.envs = self._make_envs()
        self._rewind(snapshot)

    def close(self):
        self.envs.close()


def train(trainer, run):
    """Iterate until total_frames are done. `run` saves, scores, records, and repeats what a failed worker spoilt."""
    with run.guarding():
        while trainer.counters["env_frames"] < trainer.config.ppo.total_frames:
            metrics = run.attempt(trainer)
            run.select(metrics)
            run.record(metrics)
            run.save_when_due()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a file of configs/; python -m machinery.config prints every key")
    parser.add_argument("--resume", metavar="RUN", help="latest, runs/NAME or a checkpoint file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if (args.config is None) == (args.resume is None):
        parser.error("give either --config FILE or --resume RUN")
    processes = Processes.launched()
    script = f"train.py, process {processes.rank}" if processes.rank else "train.py"
    with one_line(script, PolicyError, WorkerError), open_run(args, processes, play, evaluate, draw_run) as run:
        if run.finished():
            return
        with closing(Trainer(run.config, run.state, processes)) as trainer, run.recording(trainer):
            train(trainer, run)
            trainer.close()
            run.score()


if __name__ == "__main__":
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    main()
