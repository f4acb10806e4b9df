"""PPO from scratch on rendered frames: collect -> advantages -> update, and the loop around them.

    python train.py --config configs/cnn.yaml
    python train.py --config configs/cnn.yaml run.seed=2 ppo.learning_rate=3e-4
    python train.py --resume latest
    torchrun --standalone --nproc_per_node=2 train.py --config configs/cnn.yaml

The algorithm is Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv:1707.06347).
"""

import os

# OpenMP's threads spin after a parallel region and would steal the cores from the landers; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is loaded; SignalWatch takes over

import argparse
import copy
import ctypes
import sys
import time
from collections import deque
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoint import (
    POLICY_FILE,
    CheckpointError,
    build_policy,
    load_policy,
    load_weights,
    policy_bytes,
    read_checkpoint,
    save_checkpoint,
    write_atomically,
)
from config import ConfigError
from diagnostics import Diagnostics
from distributed import ALONE, World, launcher
from envs import NUM_ACTIONS, OUTCOMES, SELECTION_SEED, RenderedLander, WorkerError, make_vector_env
from evaluate import VideoRecorder, evaluate, play, print_report
from models import CalibrationError, WeightsError
from plot import PlotError, draw_run
from run_folder import is_finished, start_run
from signals import Interrupted, SignalWatch
from tracking import Outlet, Progress, Tracker, TrackingError


@dataclass
class Rollout:
    """num_steps decisions of N landers. Row t: what was seen, done and received at decision t."""

    seen: dict  # of tensors (stack + T, N, ...): what the policy's `look` made of each frame, history first
    stacks: torch.Tensor  # int64 (T + 1, N, stack): frames of each decision, oldest first, as rows of `seen` flattened
    actions: torch.Tensor  # int64 (T, N)
    log_probs: torch.Tensor  # float32 (T, N), log pi(action | frames) when the action was drawn
    values: torch.Tensor  # float32 (T, N)
    rewards: torch.Tensor  # float32 (T, N), scaled
    terminated: torch.Tensor  # bool (T, N): the episode ended at this decision; nothing comes after
    truncated: torch.Tensor  # bool (T, N): the episode was cut off at this decision
    final_values: torch.Tensor  # float32 (T, N): value of the last frames of a truncated episode, else 0
    next_value: torch.Tensor  # float32 (N,): value of the frames after the last decision

    @classmethod
    def empty(cls, num_steps, num_envs, stack, seen):
        """Room for num_steps decisions of num_envs landers; `seen` is an example of looked-at frames, (B, ...)."""
        device = next(iter(seen.values())).device

        def make(dtype, *shape, rows=num_steps):
            return torch.zeros(rows, num_envs, *shape, dtype=dtype, device=device)

        return cls(
            {key: make(tensor.dtype, *tensor.shape[1:], rows=stack + num_steps) for key, tensor in seen.items()},
            make(torch.int64, stack, rows=num_steps + 1),
            make(torch.int64), make(torch.float32), make(torch.float32), make(torch.float32),
            make(torch.bool), make(torch.bool), make(torch.float32), torch.zeros(num_envs, device=device))

    def flat_seen(self):
        """The frames as one batch, (rows * N, ...), which `stacks` counts in; views, not copies."""
        return {key: tensor.flatten(0, 1) for key, tensor in self.seen.items()}


@torch.no_grad()
def collect(envs, policy, rollout, frames, reward_scale, autocast):
    """Play len(rollout.actions) decisions with the policy's own samples, filling `rollout` in place.

    `frames` are the current observations, uint8 (N, K, H, W); returns those after the last decision and a dict:
    the episodes that ended (lists of return, length, outcome) and the physics steps done.
    """
    policy.eval()
    num_envs, device, stack = len(frames), rollout.values.device, rollout.stacks.shape[2]
    episodes, env_frames = [], 0
    seen = rollout.flat_seen()
    back = torch.arange(stack - 1, -1, -1, device=device)  # how long ago each frame of a stack was
    age = torch.full((num_envs, 1), stack, device=device)  # decisions since the first frame of the episode
    lander = torch.arange(num_envs, device=device)[:, None]

    def look(row, frame):
        if device.type == "cuda":
            frame = frame.pin_memory()  # the one copy; the GPU fetches it from there by itself
        with autocast:
            for key, tensor in policy.look(frame.to(device, non_blocking=True)).items():
                rollout.seen[key][row] = tensor

    def decide(t):
        # An episode's first frame stands in for those before it.
        rollout.stacks[t] = (stack - 1 + t - torch.minimum(back, age)) * num_envs + lander
        with autocast:
            return policy(seen, rollout.stacks[t])

    for row, frame in enumerate(frames.chunk(stack, dim=1)):
        look(row, frame)
    for t in range(len(rollout.actions)):
        logits, value = decide(t)
        log_probs = logits.log_softmax(-1)
        if not torch.isfinite(log_probs.sum() + value.sum()):
            raise FloatingPointError("the policy's logits or values are not finite; stopped before the optimizer")
        action = torch.multinomial(log_probs.exp(), 1)  # (N, 1)
        rollout.actions[t] = action[:, 0]
        rollout.log_probs[t] = log_probs.gather(1, action)[:, 0]
        rollout.values[t] = value

        batch = envs.step(action.view(envs.num_envs, -1).cpu().numpy())
        observations, rewards, terminated, truncated, info = batch
        if not np.isfinite(rewards).all():
            raise FloatingPointError("a reward is not finite; stopped before the optimizer")
        frames = torch.from_numpy(observations.reshape(frames.shape))
        look(stack + t, frames.chunk(stack, dim=1)[-1])
        rollout.rewards[t] = torch.from_numpy(rewards.reshape(num_envs)).to(rollout.rewards) * reward_scale
        rollout.terminated[t] = torch.from_numpy(terminated.reshape(num_envs))
        rollout.truncated[t] = torch.from_numpy(truncated.reshape(num_envs))
        age = torch.where((rollout.terminated[t] | rollout.truncated[t])[:, None], 0, age + 1)
        env_frames += int(info["env_frames"].sum())
        rollout.final_values[t] = 0
        if truncated.any():
            ended = rollout.truncated[t]
            final_frames = torch.from_numpy(info["final_frames"].reshape(frames.shape)).to(device)
            with autocast:
                rollout.final_values[t, ended] = policy(*policy.see(final_frames[ended]))[1]
        for i in np.flatnonzero(terminated | truncated):
            episodes.append(tuple(info[f"episode_{key}"].flat[i] for key in ("return", "length", "outcome")))
    rollout.next_value.copy_(decide(len(rollout.actions))[1])
    return frames, {"episodes": episodes, "env_frames": env_frames}


@torch.no_grad()
def compute_advantages(rollout, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eqs. 11 and 16).

    Returns advantages and returns (targets of the value function), both float32 (T, N). After a termination the value
    is 0; after a truncation it is that of the episode's last frames; nothing of the next episode counts.
    """
    advantages = torch.zeros_like(rollout.rewards)
    advantage = torch.zeros_like(rollout.next_value)
    next_value = rollout.next_value
    for t in reversed(range(len(rollout.rewards))):
        ended = rollout.terminated[t] | rollout.truncated[t]
        bootstrap = torch.where(ended, rollout.final_values[t], next_value)
        delta = rollout.rewards[t] + gamma * bootstrap - rollout.values[t]
        advantage = delta + gamma * gae_lambda * ~ended * advantage
        advantages[t] = advantage
        next_value = rollout.values[t]
    return advantages, advantages + rollout.values


def ppo_loss(logits, value, batch, ppo, entropy_coef, world=ALONE):
    """The clipped surrogate objective with value loss and entropy bonus (eqs. 7 and 9), to be minimised.

    logits (B, A), value (B,); batch: dict of actions, log_probs, advantages, returns, values, each (B,). Advantages are
    normalised over the minibatches of all processes of `world`. Returns the loss and a dict of detached metrics.
    """
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    logratio = log_probs.gather(1, batch["actions"][:, None])[:, 0] - batch["log_probs"]
    ratio = logratio.exp()
    advantages = batch["advantages"]
    if ppo.normalize_advantages:
        everyones = world.join_tensors(advantages)
        advantages = (advantages - everyones.mean()) / (everyones.std() + 1e-8)
    clipped = ratio.clamp(1 - ppo.clip_coef, 1 + ppo.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()

    error = (value - batch["returns"]) ** 2
    if ppo.value_clip:
        change = (value - batch["values"]).clamp(-ppo.clip_coef, ppo.clip_coef)
        error = torch.max(error, (batch["values"] + change - batch["returns"]) ** 2)
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


def update(policy, optimizer, rollout, advantages, returns, ppo, entropy_coef, autocast, generator, world=ALONE):
    """update_epochs passes over the rollout in shuffled minibatches. Returns metrics, means over all minibatches.

    With many processes, `policy` averages their gradients, and metrics are those of all their minibatches.
    """
    policy.train()
    flat = {
        "actions": rollout.actions, "log_probs": rollout.log_probs, "values": rollout.values,
        "advantages": advantages, "returns": returns}
    flat = {key: tensor.flatten() for key, tensor in flat.items()}  # (T * N,)
    seen, stacks = rollout.flat_seen(), rollout.stacks[:-1].flatten(0, 1)  # (T * N, S)
    # Decisions are shuffled in segments of one lander's successive ones, which share most of their frames.
    length, num_envs = ppo.segment_length, advantages.shape[1]
    segments = torch.arange(advantages.numel(), device=advantages.device).view(-1, length, num_envs)
    segments = segments.transpose(1, 2).reshape(-1, length)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    sums, count = {}, 0
    for _ in range(ppo.update_epochs):
        epoch_kl, order = 0.0, torch.randperm(len(segments), generator=generator).to(advantages.device)
        for indices in segments[order].flatten().chunk(ppo.num_minibatches):
            batch = {key: tensor[indices] for key, tensor in flat.items()}
            with autocast:
                logits, value = policy(seen, stacks[indices])
            loss, metrics = ppo_loss(logits, value, batch, ppo, entropy_coef, world)
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
        if ppo.target_kl is not None and world.mean(epoch_kl) > ppo.target_kl:
            break
    if not all(torch.isfinite(tensor).all() for tensor in policy.state_dict().values()):
        raise FloatingPointError("the weights are not finite; stopped after the optimizer")
    means = {key: world.mean(total / count) for key, total in sums.items()}
    values, returns = world.join_tensors(rollout.values), world.join_tensors(returns)
    return means | {"explained_variance": explained_variance(values, returns)}


def schedule(ppo, env_frames, late):
    """Learning rate and entropy bonus now: linear warm-up and annealing, and the late stage once the return is high.

    An agent that lands needs smaller steps and less exploration to land well.
    """
    left = max(1 - env_frames / ppo.total_frames, 0) if ppo.anneal else 1
    warm = min((env_frames + 1) / ppo.warmup_frames, 1) if ppo.warmup_frames else 1
    return (
        ppo.learning_rate * left * warm * (ppo.late_learning_rate if late else 1),
        ppo.entropy_coef * (ppo.late_entropy if late else 1))


def fast_bf16(device):
    """Whether bfloat16 is computed in hardware; a CPU without such instructions emulates it many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, ARM


def keep_freed_memory():
    """Tell glibc to keep what is freed, in pieces of up to 32 MiB, the most it allows, for what is allocated next.

    By itself it may give the tensors of a minibatch back to the kernel, which clears every page of the next one's.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 2**25)
        mallopt(m_trim_threshold, 2**31 - 1)


class TrainingError(Exception):
    """Training cannot go on; one line."""


# Name: a metric, and from what value on the milestone is reached; if several at once, the last is filmed.
MILESTONES = {
    "first-landing": ("rollout/landed_rate", 0.01),
    "return-100": ("rollout/return_mean", 100),
    "return-200": ("rollout/return_mean", 200),
}


class Trainer:
    """Everything that a training run is made of, and nothing that PPO needs to know: begin, go on, save, resume."""

    def __init__(self, config, folder, state=None, world=ALONE):
        keep_freed_memory()
        self.config, self.folder, self.world, run, env = config, folder, world, config.run, config.env
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(automatic if run.device == "auto" else run.device)
        if self.device.type == "cuda" and world.size > 1:
            if self.device.index is not None:
                raise ConfigError(f"run.device={run.device}: many processes need a GPU each; run.device=cuda gives it")
            self.device = torch.device("cuda", world.local_rank)
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"run.device={run.device}: this machine has {torch.cuda.device_count()} GPUs that torch can use; "
                "run.device=auto takes what there is")
        if self.device.type == "cuda" and world.size > 1:
            torch.cuda.set_device(self.device)
        self.num_threads = run.num_threads or max(len(os.sched_getaffinity(0)) // world.local_size, 1)
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=fast_bf16(self.device) if run.bf16 is None else run.bf16)
        torch.manual_seed(run.seed)
        self.generator = torch.Generator().manual_seed(world.seed(run.seed))  # shuffles minibatches
        self.policy = build_policy(config)
        if not state:
            self.policy.load_pretrained()
        self.policy.to(self.device)
        self.optimizer = torch.optim.Adam(
            self.policy.parameter_groups(), lr=config.ppo.learning_rate, eps=config.ppo.adam_eps)
        if world.rank:
            torch.manual_seed(world.seed(run.seed))  # draws actions
        self.envs = self._make_envs()
        self.counters = {
            "env_frames": 0, "updates": 0, "seconds": 0.0, "late": False, "best": None,
            "next_evaluation": config.evaluation.interval, "milestones": [],
            "scored": None}  # episodes of the final score, once it is done
        self.recent = deque(maxlen=100)  # (return, length, outcome) of the last episodes
        self.landers = [[1, []] for _ in range(env.num_envs)]  # episodes begun, actions of the last: LanderGroup.state
        self.run_id = None
        self.between_updates = True
        self.unsaved_best = None  # bytes of the policy file that a full disk did not take
        if state:
            self._restore(state)
        else:
            self.frames = self._frames(self.envs.reset()[0])
            self._calibrate()
        self.learner = world.parallel(self.policy, self.frames.to(self.device))
        newest = self.frames.chunk(env.frame_stack, dim=1)[-1].to(self.device)
        with self.autocast:
            seen = self.policy.look(newest)
        self.rollout = Rollout.empty(config.ppo.num_steps, env.num_envs, env.frame_stack, seen)

    def _make_envs(self):
        """This process's landers. Over all processes they are those that one process with as many would play."""
        env = self.config.env
        return make_vector_env(
            seed=self.config.run.seed, first_lander=self.world.rank * env.num_envs, **env.model_dump())

    def _frames(self, observations):
        return torch.from_numpy(np.asarray(observations)).flatten(0, 1)  # (workers, M, K, H, W) -> (N, K, H, W)

    def _calibrate(self, decisions=20):
        """Let the policy see some frames of random play, for what it can learn from frames alone."""
        shape, seen = (self.envs.num_envs, self.config.env.num_envs // self.envs.num_envs), []
        for _ in range(decisions):
            actions = torch.randint(NUM_ACTIONS, shape, generator=self.generator).numpy()
            observations, _, terminated, truncated, _ = self.envs.step(actions)
            self.frames = self._frames(observations)
            self._follow(actions.reshape(1, -1), (terminated | truncated).reshape(1, -1))
            seen.append(self.frames.clone())
        self.policy.calibrate(torch.cat(seen).to(self.device))

    def _follow(self, actions, ended):
        """Keep account of what the landers did, so that a checkpoint needs no answer from workers. Both (T, N)."""
        for row, ends in zip(actions.tolist(), ended.tolist(), strict=True):
            for lander, action, end in zip(self.landers, row, ends, strict=True):
                if end:
                    lander[:] = lander[0] + 1, []
                else:
                    lander[1].append(action)

    def snapshot(self):
        """What a bit-exact continuation needs besides weights and optimizer, taken between two updates.

        Of many processes, each one's landers and random numbers; and then weights and optimizer too, since the first
        process must be able to save them when another has died in the midst of the next update.
        """
        own = {
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
            "landers": [[episodes, list(actions)] for episodes, actions in self.landers],
        }
        shared = {
            "counters": dict(self.counters),
            "recent": [list(map(float, episode)) for episode in self.recent],
            "run_id": self.run_id,
        }
        if self.world.size > 1 and self.world.rank == 0:
            shared |= copy.deepcopy(self._learned())
        return shared | own | {"peers": self.world.gather(own)[1:]}

    def _learned(self):
        return {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save(self, snapshot):
        """Write a checkpoint, and before it what the run's files lack to match it; OSError leaves the old ones."""
        if self.world.rank:
            return
        self.save_best()
        name = f"{snapshot['counters']['env_frames']:012d}.ckpt"
        config = {"config": self.config.model_dump(mode="json")}
        save_checkpoint(self.folder / "checkpoints" / name, config | self._learned() | snapshot)
        for old in sorted((self.folder / "checkpoints").glob("*.ckpt"))[: -self.config.tracking.keep]:
            old.unlink(missing_ok=True)

    def save_best(self):
        if self.unsaved_best:
            write_atomically(self.folder / "checkpoints" / POLICY_FILE, self.unsaved_best)
            self.unsaved_best = None

    def mark_scored(self):
        """Note in the last checkpoint that this run has nothing left to do."""
        self.counters["scored"] = self.config.evaluation.episodes
        file = self.folder / "checkpoints" / f"{self.counters['env_frames']:012d}.ckpt"
        with suppress(OSError, CheckpointError):  # then a resumed run only scores again
            state = read_checkpoint(file)
            save_checkpoint(file, state | {"counters": dict(self.counters)})

    def _restore(self, state):
        load_weights(self.policy, state["policy"], self.folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.counters |= state["counters"]
        latest = self.counters["env_frames"] + self.config.evaluation.interval  # it may be another one than before
        self.counters["next_evaluation"] = min(self.counters["next_evaluation"], latest)
        self.run_id = state["run_id"]
        self.recent.extend(map(tuple, state["recent"]))
        self._rewind([state, *state.get("peers", [])][self.world.rank])

    def _rewind(self, snapshot):
        """Put landers and random numbers where they were at `snapshot`."""
        self.landers = [[episodes, list(actions)] for episodes, actions in snapshot["landers"]]
        size = len(self.landers) // self.envs.num_envs
        groups = [self.landers[i : i + size] for i in range(0, len(self.landers), size)]
        self.frames = self._frames(self.envs.rewind(groups))
        self.generator.set_state(snapshot["generator"])
        torch.set_rng_state(snapshot["torch_rng"])
        if snapshot["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(snapshot["cuda_rng"][0], self.device)

    def restart_workers(self, snapshot):
        """New workers for failed ones. A rollout changes no weights, so `snapshot`, from before it, is enough."""
        self.envs.close()
        self.envs = self._make_envs()
        self._rewind(snapshot)

    def update_once(self):
        """Collect, learn, and return this update's metrics."""
        ppo, counters, start = self.config.ppo, self.counters, time.perf_counter()
        learning_rate, entropy_coef = schedule(ppo, counters["env_frames"], counters["late"])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        torch.set_num_threads(1)  # while the workers have the cores
        self.frames, stats = collect(self.envs, self.policy, self.rollout, self.frames, ppo.reward_scale, self.autocast)
        torch.set_num_threads(self.num_threads)
        self._follow(self.rollout.actions, self.rollout.terminated | self.rollout.truncated)
        collected = time.perf_counter()
        advantages, returns = compute_advantages(self.rollout, ppo.gamma, ppo.gae_lambda)
        self.between_updates = False
        learned = update(
            self.learner, self.optimizer, self.rollout, advantages, returns, ppo, entropy_coef, self.autocast,
            self.generator, self.world)
        end = time.perf_counter()

        everyones = self.world.gather(stats)
        env_frames = sum(stats["env_frames"] for stats in everyones)
        self.recent.extend(episode for stats in everyones for episode in stats["episodes"])
        counters["env_frames"] += env_frames
        counters["updates"] += 1
        counters["scored"] = None
        counters["seconds"] += end - start
        returns, lengths, outcomes = zip(*self.recent, strict=True) if self.recent else ([float("nan")],) * 3
        return_mean = float(np.mean(returns))
        if ppo.late_return is not None and len(self.recent) == self.recent.maxlen and return_mean >= ppo.late_return:
            counters["late"] = True
        return {
            "rollout/return_mean": return_mean,
            "rollout/length_mean": float(np.mean(lengths)),
            "rollout/landed_rate": float(np.mean(np.equal(outcomes, OUTCOMES.index("rest")))),
            **{f"update/{key}": value for key, value in learned.items()},
            "schedule/learning_rate": learning_rate,
            "schedule/entropy_coef": entropy_coef,
            "speed/frames_per_second": env_frames / (end - start),
            "speed/collect_seconds": collected - start,
            "speed/update_seconds": end - collected,
            "eval/return_mean": float("nan"),
            "eval/landed_rate": float("nan"),
        }

    def select(self, metrics):
        """Every so often, play episodes of their own seeds greedily and keep the policy that scored best so far."""
        settings, counters, start = self.config.evaluation, self.counters, time.perf_counter()
        if self.world.rank:
            return  # and wait for the first process at the next boundary
        if counters["env_frames"] < min(counters["next_evaluation"], self.config.ppo.total_frames):
            return
        if counters["env_frames"] >= counters["next_evaluation"]:  # at the end it may not be
            counters["next_evaluation"] += settings.interval
        seeds = range(SELECTION_SEED, SELECTION_SEED + settings.selection_episodes)
        returns, _, outcomes = play(self.policy, self.config.env, seeds)
        metrics["eval/return_mean"] = float(returns.mean())
        metrics["eval/landed_rate"] = float((outcomes == OUTCOMES.index("rest")).mean())
        if counters["best"] is None or returns.mean() > counters["best"]:
            self.unsaved_best = policy_bytes(self.policy, self.config, counters["env_frames"])
            counters["best"] = float(returns.mean())
        counters["seconds"] += time.perf_counter() - start
        self.save_best()

    def film_milestones(self, metrics):
        """The videos of what was reached just now: the greedy policy of this moment on one selection seed.

        It draws no random number that training draws. What is reached is a counter, so a resumed run films none twice.
        """
        counters, start = self.counters, time.perf_counter()
        reached = [name for name, (key, least) in MILESTONES.items() if metrics[key] >= least]
        new = [name for name in reached if name not in counters["milestones"]]
        counters["milestones"] = [*counters["milestones"], *new]  # a new list: the old one may be part of a snapshot
        if not new or not self.config.evaluation.videos:
            return []
        name = f"{counters['env_frames'] / 1e6:.2f}M-{new[-1]}"
        with VideoRecorder(self.folder / "videos", 1, SELECTION_SEED, name) as recorder:
            play(self.policy, self.config.env, [SELECTION_SEED], lander_class=RenderedLander, recorder=recorder)
        counters["seconds"] += time.perf_counter() - start
        return [] if recorder.failure else recorder.paths

    def close(self):
        self.envs.close()


MAX_FAILURES = 3  # of workers, in one rollout


def train(trainer, tracker, watch):
    """Update until total_frames are done, saving as it goes; raises Interrupted after SIGINT or SIGTERM, saved too.

    Of many processes the first alone has a tracker, and writes.
    """
    config, counters = trainer.config, trainer.counters
    silent = tracker is None or not config.tracking.progress
    progress = Progress(config.ppo.total_frames, counters["env_frames"], silent=silent)
    diagnostics = Diagnostics(config)
    boundary, saved, failures, watch.patient = trainer.snapshot(), counters["env_frames"], 0, True
    try:
        trainer.save(boundary)  # a disk that takes none is found out now, not in an hour
    except OSError as error:
        raise TrainingError(f"{trainer.folder}/checkpoints: {error.strerror}; nothing is trained before that") from None
    try:
        while counters["env_frames"] < config.ppo.total_frames:
            try:
                if failures:
                    trainer.restart_workers(boundary)
                metrics = trainer.update_once()
            except WorkerError as error:
                time.sleep(0.2)  # a signal to the whole group may reach the workers before it reaches us
                watch.check()
                failures += 1
                if failures > MAX_FAILURES:
                    raise TrainingError(f"{error}, after {MAX_FAILURES} restarts") from error
                progress.say(f"{error}; going on with new workers, which repeat this rollout")
                continue
            except FloatingPointError as error:
                raise TrainingError(
                    f"update {counters['updates'] + 1}: {error} and before a checkpoint took it, those in "
                    f"{trainer.folder}/checkpoints are good. Resuming would come to the same; a new run with a smaller "
                    "ppo.learning_rate or ppo.max_grad_norm usually helps") from None
            try:
                trainer.select(metrics)
            except OSError as error:
                progress.say(f"best policy not saved ({error.strerror}); training goes on and will try again")
            if tracker:
                record(trainer, tracker, metrics, progress.say)
                for sentence in diagnostics.watch(metrics):
                    progress.say(sentence)
            progress.show(counters["env_frames"], metrics, counters["seconds"])
            boundary, trainer.between_updates, failures = trainer.snapshot(), True, 0
            watch.check_all()
            if counters["env_frames"] - saved >= config.tracking.checkpoint_interval:
                try:
                    if tracker:
                        tracker.metrics.flush()
                    trainer.save(boundary)
                    saved = counters["env_frames"]
                except OSError as error:
                    progress.say(f"checkpoint not saved ({error.strerror}); training goes on and will try again")
    finally:
        progress.close()
        # Collecting changes no weights, so the last boundary is whole even if an update was cut off in its rollout.
        whole = trainer.between_updates or "policy" in boundary
        if whole and boundary["counters"]["env_frames"] != saved:
            try:
                trainer.save(boundary)
            except OSError as error:
                raise TrainingError(
                    f"the last checkpoint could not be saved ({error.strerror}); those in {trainer.folder}/checkpoints "
                    "are older") from None
    watch.patient = False
    watch.check()  # for what came after the last boundary


def record(trainer, tracker, metrics, say):
    """Hand an update's numbers, and now and then videos and curves, to whoever watches."""
    try:
        for video in trainer.film_milestones(metrics):
            tracker.artifact(video, "videos")
    except OSError as error:
        say(f"milestone not filmed ({error.strerror}); training goes on")
    tracker.log(metrics | {"speed/total_seconds": trainer.counters["seconds"]}, trainer.counters["env_frames"])
    if not np.isnan(metrics["eval/return_mean"]):
        draw_curves(trainer.folder, tracker, say)


def draw_curves(folder, tracker, say):
    try:
        draw_run(folder, folder / "curves.png")
        tracker.artifact(folder / "curves.png")
    except (PlotError, OSError) as error:
        say(f"no curves: {error}; training goes on")


def finish(trainer, tracker):
    """Score the best policy on unseen episodes, greedy and sampled, record videos, and hand all to MLflow."""
    config, folder = trainer.config, trainer.folder
    if trainer.counters["best"] is None:  # total_frames was lowered to less than what was trained without a score
        trainer.select({})
    draw_curves(folder, tracker, print)
    for name in ("config.yaml", "metrics.csv"):
        tracker.artifact(folder / name)
    tracker.artifact(folder / "checkpoints" / POLICY_FILE, "checkpoints")
    settings = config.evaluation
    if not settings.episodes:
        return
    policy = load_policy(folder)[0].to(trainer.device)
    for sample, name, videos in ((False, "report.json", settings.videos), (True, "report_sampled.json", 0)):
        report = evaluate(
            policy, config, folder, folder, settings.episodes, videos=videos, sample=sample, report_name=name,
            video_name="best-seed-{seed}")
        print_report(report)
        tracker.artifact(folder / name)
    tracker.artifact(folder / "videos", "videos")


def rest(folder, how):
    """What can be done after an early end."""
    if folder and any(folder.glob("checkpoints/*.ckpt")):
        return f"saved; go on with: {how} {folder}"
    return "stopped before there was anything to save"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a file of configs/; python config.py prints every key")
    parser.add_argument("--resume", metavar="RUN", help="latest, runs/NAME or a checkpoint file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if (args.config is None) == (args.resume is None):
        parser.error("give either --config FILE or --resume RUN")
    world = World.launched()
    trainer, folder, watch, lock = None, None, SignalWatch(world), ExitStack()
    who = f"train.py, process {world.rank}" if world.rank else "train.py"
    how = f"{launcher(world.size, world.size // world.local_size)} train.py --resume"
    try:
        world.join()
        config, folder, state = world.share(start_run(args, lock, world.size) if world.rank == 0 else None)
        if state and is_finished(config, state):
            if world.rank == 0:
                frames = state["counters"]["env_frames"]
                print(f"{folder}: finished, {frames:,} frames; a larger ppo.total_frames goes on")
            return
        trainer = Trainer(config, folder, state, world)
        threads = f"{world.size} processes of {trainer.num_threads}" if world.size > 1 else trainer.num_threads
        watch.patient = True  # a run that MLflow has begun is to be ended there
        with Tracker(config, folder, threads, trainer.run_id) if world.rank == 0 else nullcontext() as tracker:
            watch.check_all()
            if tracker:
                trainer.run_id = tracker.run_id
                total = config.ppo.total_frames
                print(f"{folder}: {config.model.name}, {trainer.device.type}, {total:,} frames", flush=True)
            train(trainer, tracker, watch)
            trainer.close()
            world.leave()
            try:
                if tracker:
                    finish(trainer, tracker)
            except OSError as error:
                raise TrainingError(f"{error.filename or folder}: {error.strerror}; training is done and saved, and "
                                    f"{how} {folder} scores it") from None
            watch.patient = True
        if world.rank == 0:
            trainer.mark_scored()
    except (CalibrationError, CheckpointError, ConfigError, TrackingError, TrainingError, WeightsError,
            WorkerError) as error:
        sys.exit(f"{who}: {error}")
    except OSError as error:
        sys.exit(f"{who}: {error.filename}: {error.strerror}" if error.filename else f"{who}: {error}")
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if world.lost(error):
            sys.exit(1 if world.rank else f"{who}: another process of this training ended: {rest(folder, how)}")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise  # what torch raises on a CPU says that it cannot allocate memory
        sys.exit(
            f"{who}: {(str(error) or 'Out of memory.').splitlines()[0]} A larger ppo.num_minibatches, or smaller "
            "env.num_envs, ppo.num_steps or model, needs less.")
    except Interrupted as interruption:
        if world.rank == 0:
            print(f"{interruption}: {rest(folder, how)}", flush=True)
        sys.exit(interruption.code)
    finally:
        if trainer:
            trainer.close()
        lock.close()


if __name__ == "__main__":
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    main()
