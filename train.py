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
    train               the loop: iterate, score, record, save

machinery/ has what keeps a run safe, seen and repeatable.
"""

import os

# OpenMP's threads spin after a parallel region and would steal the cores from the landers. Torch reads this at import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal
import sys

if __name__ == "__main__" and "IPython" not in sys.modules:  # a notebook has a handler of its own
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a run begins, Ctrl-C ends the process at once

import argparse
import copy
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import nn

from envs import env_class, make_vector_env
from evaluate import evaluate, play
from eyes import PolicyError
from machinery.checkpoint import build_policy, load_weights
from machinery.device import open_device, rng_state, set_rng_state
from machinery.errors import one_line
from machinery.processes import SINGLE_PROCESS, Processes
from machinery.run import open_run
from machinery.terminal import Outlet
from machinery.workers import WorkerError
from plot import draw_run


@dataclass
class Rollout:
    """T decisions of N landers, each on a stack of S = env.frame_stack frames.

    `rollout[indices]` is a minibatch: B of these decisions, every field (B, ...).
    """

    frame_store: dict  # of tensors with one row per frame: the results of the policy's `preprocess`, and its own notes
    frame_ids: torch.Tensor  # int64 (T, N, S): the rows of frame_store that each decision saw, oldest frame first
    actions: torch.Tensor  # (T, N, ...)
    log_probs: torch.Tensor  # float32 (T, N), log pi(action | frames) when the action was drawn
    values: torch.Tensor  # float32 (T, N)
    next_values: torch.Tensor  # float32 (T, N), V(s_{t+1}); `collect` says what it is at an episode's end
    rewards: torch.Tensor  # float32 (T, N), scaled
    terminated: torch.Tensor  # bool (T, N): the episode ended at this decision; nothing comes after
    truncated: torch.Tensor  # bool (T, N): the episode was cut off at this decision
    advantages: torch.Tensor  # float32 (T, N)
    returns: torch.Tensor  # float32 (T, N), targets of the value function

    @classmethod
    def empty(cls, num_steps, frame_stack, example_store, example_actions):
        """Zeros for num_steps decisions of N landers. The examples give shapes and dtypes of N frames and N actions."""
        n, device = len(example_actions), next(iter(example_store.values())).device

        def zeros(dtype=torch.float32, *shape, length=num_steps):
            return torch.zeros(length, n, *shape, dtype=dtype, device=device)

        slots = frame_stack + num_steps  # the stack before the first decision, then a frame after each
        store = {k: zeros(t.dtype, *t.shape[1:], length=slots).flatten(0, 1) for k, t in example_store.items()}
        special = {
            "frame_store": store, "frame_ids": zeros(torch.int64, frame_stack), "terminated": zeros(torch.bool),
            "truncated": zeros(torch.bool), "actions": zeros(example_actions.dtype, *example_actions.shape[1:])}
        return cls(**special, **{field.name: zeros() for field in fields(cls) if field.name not in special})

    def __getitem__(self, indices):
        """The minibatch `indices`, int64 (B,): t * N + n is decision t of lander n. The frame store stays whole."""
        chosen = {key: value.flatten(0, 1)[indices] for key, value in vars(self).items() if key != "frame_store"}
        return Rollout(self.frame_store, **chosen)


@torch.no_grad()
def collect(envs, policy, rollout, frames, reward_scale, autocast):
    """Play T decisions with the policy's own samples.

    `frames` are the current observations, uint8 (N, K, H, W): stacks of S frames with C colour planes, K = S * C.
    Fills `rollout` in place, except for advantages and returns. Returns the observations after the last decision, and
    a dict: `episodes`, one {metric: number} per ended episode, and `env_frames`, environment steps.
    """
    policy.eval()
    device, (num_steps, num_envs, frame_stack) = rollout.values.device, rollout.frame_ids.shape
    final_values = torch.zeros_like(rollout.values)  # values of the last stacks of truncated episodes
    episodes, env_frames = [], 0

    def store(slot, newest):
        """Keep one frame of each lander, uint8 (N, C, H, W)."""
        if device.type == "cuda":
            newest = newest.pin_memory()  # so that the copy to the GPU runs beside the program
        with autocast:
            for key, tensor in policy.preprocess(newest.to(device, non_blocking=True)).items():
                rollout.frame_store[key][slot * num_envs : (slot + 1) * num_envs] = tensor

    # The store has S + T slots of N rows; a frame id is the number of a row. Lander n's frame in slot k has the id
    # k * N + n. Slots 0 to S - 1 hold the stack before the first decision, slot S + t the frame after decision t. So
    # decision t sees slots t to t + S - 1; the first frame of an episode replaces all frames from before it.
    # Example with N = 2 and S = 3: lander 1 sees the ids [1, 3, 5] at decision 0 and [3, 5, 7] at decision 1. If its
    # episode ends with decision 1, id 9 is the first frame of the next: [9, 9, 9] at decision 2, then [9, 9, 11].
    steps_back = torch.arange(frame_stack - 1, -1, -1, device=device)  # (S,)
    # Decisions since the episode's first frame. S at first, since the initial stack already holds its repeats.
    episode_age = torch.full((num_envs, 1), frame_stack, device=device)
    lander = torch.arange(num_envs, device=device)[:, None]

    def forward_at(t):
        frame_ids = (frame_stack - 1 + t - torch.minimum(steps_back, episode_age)) * num_envs + lander  # (N, S)
        with autocast:
            return frame_ids, policy(rollout.frame_store, frame_ids)

    for slot, frame in enumerate(frames.chunk(frame_stack, dim=1)):
        store(slot, frame)
    for t in range(num_steps):
        rollout.frame_ids[t], output = forward_at(t)
        likeliest = output.distribution.mode()
        if not torch.isfinite(output.distribution.log_prob(likeliest).sum() + output.value.sum()):
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
        ended = rollout.terminated[t] | rollout.truncated[t]
        episode_age = torch.where(ended[:, None], 0, episode_age + 1)
        if truncated.any():  # the value of the last stack stands for the rewards that the time limit cut off
            final_frames = torch.from_numpy(info["final_frames"][truncated]).to(device)
            with autocast:
                final_values[t, rollout.truncated[t]] = policy(*policy.preprocess_stacks(final_frames)).value
        env_frames += int(info["env_frames"].sum())
        for n in np.flatnonzero(terminated | truncated):
            episodes.append({key: float(values[n]) for key, values in info["episode"].items()})
    # V(s_{t+1}): 0 after a termination; after a truncation (the bootstrap) the value of the episode's last stack.
    rollout.next_values[:] = torch.cat([rollout.values[1:], forward_at(num_steps)[1].value[None]])
    rollout.next_values[rollout.terminated] = 0
    rollout.next_values[rollout.truncated] = final_values[rollout.truncated]
    return frames, {"episodes": episodes, "env_frames": env_frames}


@torch.no_grad()
def compute_advantages(rollout, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eqs. 11 and 16), in place.

    A_t = delta_t + gamma * lambda * A_{t+1} within an episode, with delta_t = r_t + gamma * V(s_{t+1}) - V(s_t). Both
    kinds of ending cut this sum; only a truncation keeps its V(s_{t+1}). The returns, which the value function is to
    learn, are A_t + V(s_t).
    """
    advantage = torch.zeros_like(rollout.values[0])  # (N,)
    for t in reversed(range(len(rollout.rewards))):
        ended = rollout.terminated[t] | rollout.truncated[t]
        delta = rollout.rewards[t] + gamma * rollout.next_values[t] - rollout.values[t]
        advantage = delta + gamma * gae_lambda * ~ended * advantage
        rollout.advantages[t] = advantage
    rollout.returns[:] = rollout.advantages + rollout.values


def ppo_loss(output, minibatch, ppo, entropy_coef, processes=SINGLE_PROCESS):
    """The clipped surrogate objective with value loss and entropy bonus (Schulman et al. 2017, eqs. 7 and 9), negated.

    output: the models.PolicyOutput for `minibatch`, a Rollout of B decisions. Advantages are normalised over the
    minibatches of all processes. Returns the loss and a dict of detached metrics.
    """
    entropy = output.distribution.entropy().mean()
    logratio = output.distribution.log_prob(minibatch.actions) - minibatch.log_probs
    ratio = logratio.exp()
    advantages = minibatch.advantages
    if ppo.normalize_advantages:
        gathered = processes.all_gather(advantages)
        advantages = (advantages - gathered.mean()) / (gathered.std() + 1e-8)
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


def update(policy, optimizer, rollout, ppo, entropy_coef, autocast, generator, processes=SINGLE_PROCESS):
    """update_epochs passes over the rollout in shuffled minibatches. Returns metrics, means over all minibatches.

    With many processes, `policy` averages their gradients, and metrics are those of all their minibatches.
    """
    policy.train()
    # The shuffle permutes segments: segment_length successive decisions of one lander. A policy that encodes frames one
    # by one then encodes the frames that they share once. With length 1, the default, it is the ordinary shuffle.
    # Example with T = 4, N = 2 and length 2: [0, 2], [1, 3] of landers 0 and 1, then [4, 6], [5, 7].
    num_envs, device = rollout.values.shape[1], rollout.values.device
    decisions = torch.arange(rollout.values.numel(), device=device).view(-1, ppo.segment_length, num_envs)
    segments = decisions.transpose(1, 2).reshape(-1, ppo.segment_length)
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
            optimizer.zero_grad()
            loss.backward()
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), ppo.max_grad_norm).detach()
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
    """Learning rate and entropy coefficient now: warm-up and annealing; in the late stage, both times a factor.

    `Trainer.iterate` decides when that begins. A policy that lands improves faster with small steps and no bonus.
    """
    remaining = max(1 - env_frames / ppo.total_frames, 0)
    warmup = min((env_frames + 1) / ppo.warmup_frames, 1) if ppo.warmup_frames else 1
    return (
        ppo.learning_rate * remaining**ppo.anneal * warmup * (ppo.late_learning_rate if late else 1),
        ppo.entropy_coef * (ppo.late_entropy if late else 1))


def episode_means(episodes, names):
    """{metric: mean} over episodes; before the first has ended, a rate is 0 and any other mean nan."""
    if not episodes:
        return {key: 0.0 if key.endswith("_rate") else float("nan") for key in names}
    # A resumed run may have gained a metric that the episodes before did not measure.
    return {key: float(np.mean([episode.get(key, np.nan) for episode in episodes])) for key in names}


class Trainer:
    """Policy, optimizer and landers, and how far they have come; machinery.run.Run has all else of a run."""

    def __init__(self, config, state=None, processes=SINGLE_PROCESS):
        """state: a checkpoint, as machinery.run_folder.resume_run gives it, to go on from."""
        self.config, self.processes, env, seed = config, processes, config.env, config.run.seed
        self.device, self.gauge, self.autocast = open_device(config.run, processes)
        torch.set_num_threads(self.gauge.num_threads)
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(processes.seed(seed))  # for shuffles, and play before training
        self.policy = build_policy(config)
        if not state:
            self.policy.load_pretrained()
        self.policy.to(self.device)
        self.optimizer = torch.optim.Adam(
            self.policy.parameter_groups(), lr=config.ppo.learning_rate, eps=config.ppo.adam_eps)
        if processes.rank:
            torch.manual_seed(processes.seed(seed))  # weights are alike in all processes, sampled actions are not
        self.counters = {"env_frames": 0, "updates": 0, "late": False}
        self.recent = deque(maxlen=100)  # {metric: number} of the last episodes
        self.weights_match_snapshot = True  # no update has touched them since the last `snapshot`
        self.envs = self._make_envs()
        if state:
            self._restore(state)
        else:
            self.frames = torch.from_numpy(self.envs.reset()[0])
            self._calibrate()
        with self.autocast:
            example_store = self.policy.preprocess(self.frames.chunk(env.frame_stack, dim=1)[-1].to(self.device))
        example_actions = torch.from_numpy(np.zeros(self.envs.action_space.shape, self.envs.action_space.dtype))
        self.rollout = Rollout.empty(config.ppo.num_steps, env.frame_stack, example_store, example_actions)
        self.ddp_policy = processes.parallel(self.policy, self.rollout[torch.zeros(1, dtype=torch.int64)])

    def _make_envs(self):
        """This process's landers. Over all processes they are those that one process with as many would play."""
        env = self.config.env
        return make_vector_env(
            env.num_envs, env.num_workers, self.config.run.seed, self.processes.rank * env.num_envs, **env.settings())

    def _calibrate(self):
        """Let the policy see some frames of random play, for what it can learn from frames alone."""
        frames, spaces, shape, eye = [], self.policy.spaces, self.envs.action_space.shape, self.policy.eye
        pictures, apart = (eye.pictures, eye.decisions_apart) if eye else (20, 1)
        for decision in range(pictures * apart):
            if spaces.continuous:
                actions = 2 * torch.rand(shape, generator=self.generator) - 1
            else:
                actions = torch.randint(spaces.num_actions, shape, generator=self.generator)
            self.frames = torch.from_numpy(self.envs.step(actions.numpy())[0])
            if decision % apart == apart - 1:
                frames.append(self.frames[:32].clone())  # so many environments show enough
        self.policy.calibrate(torch.cat(frames).to(self.device))

    def iterate(self):
        """Collect, compute advantages, update; the metrics of this iteration."""
        ppo, counters, start = self.config.ppo, self.counters, time.perf_counter()
        learning_rate, entropy_coef = schedule(ppo, counters["env_frames"], counters["late"])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        torch.set_num_threads(1)  # while the workers have the cores
        self.frames, stats = collect(self.envs, self.policy, self.rollout, self.frames, ppo.reward_scale, self.autocast)
        collect_end = time.perf_counter()
        with self.gauge.measured():
            compute_advantages(self.rollout, ppo.gamma, ppo.gae_lambda)
            self.weights_match_snapshot = False
            learning = update(self.ddp_policy, self.optimizer, self.rollout, ppo, entropy_coef, self.autocast,
                              self.generator, self.processes)
        end = time.perf_counter()

        gathered = self.processes.all_gather_object(stats)
        env_frames = sum(stats["env_frames"] for stats in gathered)
        self.recent.extend(episode for stats in gathered for episode in stats["episodes"])
        counters["env_frames"] += env_frames
        counters["updates"] += 1
        episodes = episode_means(self.recent, env_class(self.config.env.id).metrics)
        if ppo.late_return is not None and len(self.recent) == self.recent.maxlen:
            counters["late"] |= episodes["return_mean"] >= ppo.late_return
        return {
            **{f"rollout/{key}": value for key, value in episodes.items()},
            **{f"update/{key}": value for key, value in learning.items()},
            "schedule/learning_rate": learning_rate,
            "schedule/entropy_coef": entropy_coef,
            "speed/frames_per_second": env_frames / (end - start),
            "speed/collect_seconds": collect_end - start,
            "speed/update_seconds": end - collect_end,
        }

    def snapshot(self):
        """All that a bit-exact continuation needs besides weights and optimizer, taken between two iterations.

        Of many processes each has its own landers and random numbers. There the snapshot holds weights and optimizer,
        too: the first process must be able to save them when another has died in the middle of the next update.
        """
        own = {
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": rng_state(self.device),
            "landers": [[episodes, list(actions)] for episodes, actions in self.envs.state],
            "num_threads": self.gauge.num_threads,
        }
        shared = {"counters": dict(self.counters), "recent": list(self.recent)}
        if self.processes.size > 1 and self.processes.rank == 0:
            shared |= copy.deepcopy(self.state_dicts())
        return shared | own | {"peers": self.processes.all_gather_object(own)[1:]}

    def state_dicts(self):
        return {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _restore(self, state):
        load_weights(self.policy, state["policy"], state["source"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.counters |= {key: state["counters"][key] for key in self.counters}
        self.recent.extend(state["recent"])
        own = [state, *state.get("peers", [])][self.processes.rank]
        self._restore_envs(own)
        self.gauge.restore(own)

    def _restore_envs(self, snapshot):
        """Put environments and random numbers where they were at `snapshot`."""
        self.frames = torch.from_numpy(self.envs.restore(snapshot["landers"]))
        self.generator.set_state(snapshot["generator"])
        torch.set_rng_state(snapshot["torch_rng"])
        set_rng_state(self.device, snapshot["cuda_rng"])

    def restart_workers(self, snapshot):
        """New workers for failed ones. A rollout changes no weights, so `snapshot`, from before it, is enough."""
        self.envs.close()
        self.envs = self._make_envs()
        self._restore_envs(snapshot)

    def close(self):
        self.envs.close()


def train(trainer, run):
    """Iterate until total_frames are done. If a worker fails, `run` restarts the workers and iterates once more."""
    with run.saving_on_exit():
        while trainer.counters["env_frames"] < trainer.config.ppo.total_frames:
            metrics = run.iterate_with_retries(trainer)
            run.score_candidate(metrics)
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
            trainer.close()  # the final score has the cores for itself
            run.score()


if __name__ == "__main__":
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    main()
