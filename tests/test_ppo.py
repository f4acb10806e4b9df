"""The numbers of PPO: advantages, loss and diagnostics against hand-made cases, and environments only PPO can solve."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from machinery.config import PPO
from models import POLICIES, Categorical, DiagonalGaussian, PolicyOutput, Spaces, Temporal, make_policy
from train import Rollout, collect, compute_advantages, explained_variance, ppo_loss, schedule, update

FP32 = torch.autocast("cpu", enabled=False)


def empty_rollout(num_steps, num_envs):
    return Rollout.empty(num_steps, 1, {"frames": torch.zeros(num_envs, 1)}, torch.zeros(num_envs, dtype=torch.int64))


def rollout_for(envs, policy, frames, stack=1):
    """An empty Rollout of 8 decisions of `policy` in `envs`, whose current observations are `frames`."""
    frame_store = policy.preprocess(frames.chunk(stack, dim=1)[-1])
    return Rollout.empty(8, stack, frame_store, torch.zeros(len(frames), dtype=torch.int64))


def advantages_by_definition(rollout, gamma, lam):
    """A^GAE = sum over k of (gamma lam)^k delta_{t+k}, summed up to the episode's or the rollout's end."""
    steps, envs = rollout.rewards.shape
    advantages = np.zeros((steps, envs))
    for n in range(envs):
        for t in range(steps):
            for k in range(t, steps):
                following = float(rollout.next_values[k, n])
                delta = float(rollout.rewards[k, n]) + gamma * following - float(rollout.values[k, n])
                advantages[t, n] += (gamma * lam) ** (k - t) * delta
                if rollout.terminated[k, n] or rollout.truncated[k, n]:
                    break
    return advantages


def test_advantages_equal_a_plain_double_loop():
    generator = torch.Generator().manual_seed(0)
    rollout = empty_rollout(40, 6)
    for tensor in (rollout.rewards, rollout.values, rollout.next_values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    endings = torch.rand(40, 6, generator=generator)
    rollout.terminated[:] = endings < 0.1
    rollout.truncated[:] = (endings >= 0.1) & (endings < 0.2)
    rollout.terminated[-1, 0], rollout.truncated[-1, 1] = True, True  # endings at the rollout's border
    rollout.truncated &= ~rollout.terminated
    compute_advantages(rollout, 0.97, 0.9)
    expected = advantages_by_definition(rollout, 0.97, 0.9)
    np.testing.assert_allclose(rollout.advantages.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(rollout.returns.numpy(), expected + rollout.values.numpy(), atol=1e-5)


def test_termination_and_truncation_differ_by_the_bootstrap():
    """Of landers that end at their first decision, one in each way, and of one that flies on."""
    envs = ScriptedEnvs(terminated=[[1, 0, 0]], truncated=[[0, 1, 0]], frames=[[0, 0, 0], [100, 100, 100]], final=10)
    rollout = envs.collected()
    assert rollout.next_values.tolist() == [[0.0, 10.0, 100.0]]  # 100 is the next episode's; must not leak
    rollout.rewards[:] = 1
    compute_advantages(rollout, 0.5, 0.95)
    assert rollout.advantages.tolist() == [[1.0, 6.0, 51.0]]


def test_next_values_equal_a_plain_double_loop():
    rng = np.random.default_rng(0)
    frames, endings = rng.integers(0, 200, (21, 6)), rng.random((20, 6))
    terminated, truncated = endings < 0.1, (endings >= 0.1) & (endings < 0.2)
    terminated[-1, 0], truncated[-1, 1] = True, True  # endings at the rollout's border
    truncated &= ~terminated
    envs = ScriptedEnvs(terminated, truncated, frames, final=250)
    rollout = envs.collected()
    for t in range(20):
        for n in range(6):
            following = 0 if terminated[t, n] else 250 if truncated[t, n] else frames[t + 1, n]
            assert rollout.next_values[t, n] == following
    assert envs.ended == (terminated | truncated).sum()
    np.testing.assert_array_equal(rollout.values.numpy(), frames[:-1])


class Brightness(nn.Module):
    """A policy to which a frame is worth its brightness."""

    def preprocess(self, frames):
        return {"frames": frames.flatten(1)}

    def preprocess_stacks(self, stacks):
        return self.preprocess(stacks), torch.arange(len(stacks))[:, None]

    def forward(self, frame_store, frame_ids, minibatch=None):
        seen = frame_store["frames"][frame_ids[:, -1], 0]
        return PolicyOutput(Categorical(torch.zeros(len(seen), 2)), seen.float())


class ScriptedEnvs:
    """Endings (T, N) and brightnesses of the frames (T + 1, N) as given; `final` ends a truncated episode."""

    def __init__(self, terminated, truncated, frames, final):
        self.terminated, self.truncated, self.frames = (np.array(x) for x in (terminated, truncated, frames))
        self.final, self.time = final, 0

    def shown(self):
        return self.frames[self.time].astype(np.uint8).reshape(-1, 1, 1, 1)

    def step(self, actions):
        terminated, truncated = self.terminated[self.time] > 0, self.truncated[self.time] > 0
        self.time += 1
        info = {"env_frames": np.ones(len(actions), int), "episode": {"return_mean": np.zeros(len(actions))},
                "final_frames": np.full((len(actions), 1, 1, 1), self.final, np.uint8)}
        return self.shown(), np.zeros(len(actions)), terminated, truncated, info

    def collected(self):
        policy, frames = Brightness(), torch.from_numpy(self.shown())
        rollout = Rollout.empty(len(self.terminated), 1, policy.preprocess(frames),
                                torch.zeros(len(frames), dtype=torch.int64))
        self.ended = len(collect(self, policy, rollout, frames, 1.0, FP32)[1]["episodes"])
        return rollout


class StackedEnvs:
    """Two landers in frames of brightness 10 t + n; the episode of the second ends with decision 1."""

    def __init__(self):
        self.stacks, self.time = np.array([[0] * 3, [1] * 3]), 0

    def shown(self):
        return torch.from_numpy(self.stacks.astype(np.uint8).reshape(2, 3, 1, 1))

    def step(self, actions):
        self.time += 1
        newest, ended = 10 * self.time + np.arange(2), np.array([False, self.time == 2])
        self.stacks = np.concatenate([self.stacks[:, 1:], newest[:, None]], 1)
        self.stacks[ended] = newest[ended][:, None]
        info = {"env_frames": np.ones(2, int), "episode": {"return_mean": np.zeros(2)}}
        return self.shown().numpy(), np.zeros(2), ended, np.zeros_like(ended), info


def test_each_decision_sees_the_stack_that_its_environment_showed():
    envs, policy = StackedEnvs(), Brightness()
    rollout = Rollout.empty(4, 3, policy.preprocess(envs.shown()[:, :1]), torch.zeros(2, dtype=torch.int64))
    collect(envs, policy, rollout, envs.shown(), 1.0, FP32)
    assert rollout.frame_ids[:, 0].tolist() == [[0, 2, 4], [2, 4, 6], [4, 6, 8], [6, 8, 10]]
    assert rollout.frame_ids[:, 1].tolist() == [[1, 3, 5], [3, 5, 7], [9, 9, 9], [9, 9, 11]]  # as collect tells
    seen = rollout.frame_store["frames"][rollout.frame_ids, 0]  # (T, N, S)
    assert seen[:, 0].tolist() == [[0, 0, 0], [0, 0, 10], [0, 10, 20], [10, 20, 30]]
    assert seen[:, 1].tolist() == [[1, 1, 1], [1, 1, 11], [21, 21, 21], [21, 21, 31]]


def test_a_minibatch_holds_segments_of_one_lander():
    """Three decisions in a row each, of two landers that play six; both passes see each decision once."""
    policy, seen = TinyPolicy(), []
    rollout = Rollout.empty(6, 1, {"frames": torch.zeros(2, 1)}, torch.zeros(2, dtype=torch.int64))
    rollout.frame_ids[:] = torch.arange(12).view(6, 2, 1)  # of decision t of lander n: 2 t + n
    policy.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1][:, 0]))
    update(policy, torch.optim.SGD(policy.parameters(), lr=0.1), rollout,
           PPO(update_epochs=2, num_minibatches=2, segment_length=3), 0.0, FP32, torch.Generator().manual_seed(0))
    assert [len(decisions) for decisions in seen] == [6] * 4
    passes = torch.stack(seen).view(2, 4, 3)  # four segments each
    assert {tuple(segment) for each in passes for segment in each.tolist()} == {
        (0, 2, 4), (1, 3, 5), (6, 8, 10), (7, 9, 11)}
    assert [each.unique().tolist() for each in passes] == [list(range(12))] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_outputs_that_are_not_finite_stop_the_rollout(kind, bad):
    envs = ScriptedEnvs(terminated=[[0]], truncated=[[0]], frames=[[0], [0]], final=0)
    numbers = torch.tensor([[0.0, bad]])
    likeliest = Categorical(numbers) if kind == "discrete" else DiagonalGaussian(numbers, torch.zeros(2))
    with (patch.object(Brightness, "forward", lambda *_: PolicyOutput(likeliest, torch.zeros(1))),
          pytest.raises(FloatingPointError, match="the policy's logits or values are not finite")):
        envs.collected()


def hand_made_batch():
    """Four decisions among two actions; the old probabilities of the actions taken are 0.5 each."""
    chances = torch.tensor([0.6, 0.5, 0.2, 0.2])  # new probabilities of action 0
    minibatch = empty_rollout(1, 4)[torch.arange(4)]
    minibatch.log_probs = torch.full((4,), 0.5).log()
    minibatch.advantages = torch.tensor([2.0, 1.0, -1.0, 1.0])
    minibatch.returns = torch.tensor([1.0, 0.0, 2.0, 1.0])
    logits = torch.stack([chances, 1 - chances], 1).log().requires_grad_()
    return logits, PolicyOutput(Categorical(logits), torch.tensor([0.5, 0.0, 1.0, 1.0])), minibatch


def test_loss_on_a_hand_made_case():
    _, output, minibatch = hand_made_batch()
    ppo = PPO(clip_coef=0.1, value_coef=0.5, normalize_advantages=False)
    loss, metrics = ppo_loss(output, minibatch, ppo, entropy_coef=0.01)
    # Ratios 1.2, 1.0, 0.4, 0.4. Clipped to 0.9..1.1 the terms are min(2.4, 2.2), min(1, 1), min(-0.4, -0.9), and
    # min(0.4, 0.9), where it is the unclipped one that is smaller.
    policy_loss = -(2.2 + 1.0 - 0.9 + 0.4) / 4
    value_loss = 0.5 * (0.25 + 0 + 1 + 0) / 4
    entropy = -np.mean([p * np.log(p) + (1 - p) * np.log(1 - p) for p in (0.6, 0.5, 0.2, 0.2)])
    assert float(metrics["policy_loss"]) == pytest.approx(policy_loss, abs=1e-6)
    assert float(metrics["value_loss"]) == pytest.approx(value_loss, abs=1e-6)
    assert float(metrics["entropy"]) == pytest.approx(entropy, abs=1e-6)
    assert float(loss) == pytest.approx(policy_loss + 0.5 * value_loss - 0.01 * entropy, abs=1e-6)
    assert float(metrics["clip_fraction"]) == pytest.approx(3 / 4)
    kl = np.mean([ratio - 1 - np.log(ratio) for ratio in (1.2, 1.0, 0.4, 0.4)])
    assert float(metrics["approx_kl"]) == pytest.approx(kl, abs=1e-6)


def test_loss_of_a_gaussian_on_a_hand_made_case():
    """Two decisions at action 1, drawn from N(0, 1): now from N(0.5, 1), and from N(0, 1) as before."""
    minibatch = empty_rollout(1, 2)[torch.arange(2)]
    minibatch.actions = torch.ones(2, 1)
    minibatch.log_probs = torch.full((2,), -1.41894)
    minibatch.advantages = torch.tensor([1.0, -1.0])
    output = PolicyOutput(DiagonalGaussian(torch.tensor([[0.5], [0.0]]), torch.zeros(1)), torch.zeros(2))
    ppo = PPO(clip_coef=0.2, normalize_advantages=False)
    loss, metrics = ppo_loss(output, minibatch, ppo, entropy_coef=0.01)
    ratio = np.exp(0.5 * (1 - 0.25))  # 1.45: density at a distance of 0.5 instead of 1
    assert float(metrics["policy_loss"]) == pytest.approx(-(1.2 - 1.0) / 2, abs=1e-4)
    assert float(metrics["clip_fraction"]) == 0.5
    assert float(metrics["approx_kl"]) == pytest.approx((ratio - 1 - np.log(ratio)) / 2, abs=1e-4)
    entropy = 0.5 * np.log(2 * np.pi * np.e)
    assert float(metrics["entropy"]) == pytest.approx(entropy, abs=1e-5)
    assert float(loss) == pytest.approx(-0.1 - 0.01 * entropy, abs=1e-4)


def test_advantages_are_normalised():
    _, output, minibatch = hand_made_batch()
    _, metrics = ppo_loss(output, minibatch, PPO(clip_coef=0.1), 0.0)
    advantages = np.array([2.0, 1.0, -1.0, 1.0])
    advantages = (advantages - 0.75) / np.std(advantages, ddof=1)
    ratios = np.array([1.2, 1.0, 0.4, 0.4])
    terms = np.minimum(ratios * advantages, ratios.clip(0.9, 1.1) * advantages)
    assert float(metrics["policy_loss"]) == pytest.approx(-terms.mean(), abs=1e-6)


def test_value_clipping_takes_the_worse_of_two_errors():
    _, output, minibatch = hand_made_batch()
    _, metrics = ppo_loss(output, minibatch, PPO(clip_coef=0.1, value_clip=True), 0.0)
    # Values may move by 0.1 from 0: errors max(0.5, 0.9)^2, 0, max(1, 1.9)^2, max(0, 0.9)^2.
    assert float(metrics["value_loss"]) == pytest.approx(0.5 * (0.81 + 0 + 3.61 + 0.81) / 4, abs=1e-6)


def test_clipped_decisions_give_no_gradient():
    logits, output, minibatch = hand_made_batch()
    ppo = PPO(clip_coef=0.1, normalize_advantages=False)
    ppo_loss(output, minibatch, ppo, 0.0)[0].backward()
    # The first is beyond the clip with a positive advantage, the third beyond it with a negative one.
    assert logits.grad[0].abs().max() == 0
    assert logits.grad[1].abs().max() > 0
    assert logits.grad[2].abs().max() == 0
    assert logits.grad[3].abs().max() > 0  # it has moved as far, but the wrong way


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((3,), 5.0), returns) == 0
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert np.isnan(explained_variance(returns, torch.ones(3)))


def test_schedule_warms_up_anneals_and_knows_the_late_stage():
    ppo = PPO(learning_rate=1e-3, entropy_coef=0.01, total_frames=100, late_learning_rate=0.5, late_entropy=0.1)
    warm = ppo.model_copy(update={"anneal": 0, "warmup_frames": 10})
    assert [schedule(warm, frames, False)[0] for frames in (0, 4, 9, 50)] == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3])
    assert schedule(ppo, 0, False) == pytest.approx((1e-3, 0.01))
    assert schedule(ppo, 75, False) == pytest.approx((2.5e-4, 0.01))
    assert schedule(ppo, 75, True) == pytest.approx((1.25e-4, 0.001))
    assert schedule(ppo, 120, False)[0] == 0
    assert schedule(ppo.model_copy(update={"anneal": 0}), 75, False)[0] == 1e-3
    assert schedule(ppo.model_copy(update={"anneal": 2}), 75, False)[0] == pytest.approx(6.25e-5)
    # Runs from before it was a power say true or false, in their config.yaml and in their weights' file.
    assert [PPO(anneal=said).anneal for said in (True, False, "true", "false")] == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="valid number"):
        PPO(anneal="no")


class ProbeEnvs:
    """An environment in the form of envs.FrameVectorEnv, for rules written as plain functions.

    rule(step, observation, action) -> (reward, ended); observations are -1 or 1, shown as frames all 0 or all 255.
    """

    def __init__(self, rule, random_observation, num_envs=16, shape=(1, 1, 1)):
        self.shape = shape  # K, H, W
        self.rule, self.random, self.rng = rule, random_observation, np.random.default_rng(0)
        self.num_envs, self.steps = num_envs, np.zeros(num_envs, int)
        self.observations = np.stack([self._begin() for _ in range(num_envs)])

    def _begin(self):
        return self.rng.choice([0, 255]) if self.random else 255

    def frames(self):
        return np.tile(self.observations.astype(np.uint8).reshape(self.num_envs, 1, 1, 1), self.shape)

    def step(self, actions):
        rewards, terminated = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        for i, action in enumerate(actions):
            seen = 1 if self.observations[i] else -1
            rewards[i], terminated[i] = self.rule(self.steps[i], seen, action)
            self.steps[i] = 0 if terminated[i] else self.steps[i] + 1
            # A new observation each step; at the second step of a two-step episode the probe shows -1.
            self.observations[i] = self._begin() if self.random or terminated[i] else 0
        info = {"env_frames": np.ones(self.num_envs, int), "episode": {"return_mean": np.ones(self.num_envs)}}
        return self.frames(), rewards, terminated, np.zeros_like(terminated), info


class TinyPolicy(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(1, 32), nn.Tanh())
        self.actor, self.critic = nn.Linear(32, 2), nn.Linear(32, 1)
        nn.init.zeros_(self.actor.weight)

    def preprocess(self, frames):
        return {"frames": frames.flatten(1)}

    def preprocess_stacks(self, stacks):
        return self.preprocess(stacks), torch.arange(len(stacks))[:, None]

    def forward(self, frame_store, frame_ids, minibatch=None):
        hidden = self.hidden(frame_store["frames"][frame_ids[:, -1]].float() / 127.5 - 1)
        return PolicyOutput(Categorical(self.actor(hidden)), self.critic(hidden)[:, 0])


def learn(rule, random_observation, updates=60, policy=None, stack=1, shape=(1, 1, 1), learning_rate=1e-2, **settings):
    """Train a policy with collect, compute_advantages and update; probabilities (2, 2) and values (2,) at -1, 1."""
    torch.manual_seed(0)
    envs, generator = ProbeEnvs(rule, random_observation, shape=shape), torch.Generator().manual_seed(0)
    policy = policy or TinyPolicy()
    ppo = PPO(**{"gamma": 0.5, "gae_lambda": 0.95, "num_minibatches": 4, "entropy_coef": 0.0, **settings})
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    frames = torch.from_numpy(envs.frames())
    rollout = rollout_for(envs, policy, frames, stack)
    for _ in range(updates):
        frames, _ = collect(envs, policy, rollout, frames, 1.0, FP32)
        compute_advantages(rollout, ppo.gamma, ppo.gae_lambda)
        update(policy, optimizer, rollout, ppo, 0.0, FP32, generator)
    with torch.no_grad():
        both = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, shape[0] // stack, *shape[1:])
        output = policy.eval()(policy.preprocess(both), torch.tensor([[0] * stack, [1] * stack]))
    return output.distribution.probs.numpy(), output.value.numpy()


def test_probe_constant_value():
    _, values = learn(lambda step, seen, action: (1.0, True), False)
    assert values[1] == pytest.approx(1, abs=0.05)


def test_probe_value_from_observation():
    _, values = learn(lambda step, seen, action: (float(seen), True), True)
    np.testing.assert_allclose(values, [-1, 1], atol=0.1)


def test_probe_discounting():
    """Two steps, reward 1 at the second: the first is worth gamma."""
    _, values = learn(lambda step, seen, action: (float(step == 1), step == 1), False)
    np.testing.assert_allclose(values, [1, 0.5], atol=0.07)


def test_probe_policy():
    probabilities, _ = learn(lambda step, seen, action: (1.0 if action == 1 else -1.0, True), False)
    assert probabilities[1, 1] > 0.95


def test_probe_policy_from_observation():
    probabilities, _ = learn(lambda step, seen, action: (1.0 if (action == 1) == (seen == 1) else -1.0, True), True)
    assert probabilities[0, 0] > 0.95
    assert probabilities[1, 1] > 0.95


def small_policy(name):
    """A shipped policy for stacks of two gray frames of 16x16 pixels and two actions."""
    torch.manual_seed(0)
    small = {"width": 32, "heads": 2, "layers": 1} if issubclass(POLICIES[name], Temporal) else {}
    options = POLICIES[name].Options(eye="none", mirror=False, features=32, **small)
    return make_policy(options, Spaces(frame_stack=2, planes=1, height=16, width=16, num_actions=2))


PIXELS = {"stack": 2, "shape": (2, 16, 16), "learning_rate": 2e-3, "updates": 25}


@pytest.mark.parametrize("name", POLICIES)
def test_probe_policy_from_pixels(name):
    probabilities, _ = learn(
        lambda step, seen, action: (1.0 if (action == 1) == (seen == 1) else -1.0, True), True,
        policy=small_policy(name), **PIXELS)
    assert probabilities[0, 0] > 0.9
    assert probabilities[1, 1] > 0.9


@pytest.mark.parametrize("name", POLICIES)
def test_probe_value_and_discounting_from_pixels(name):
    _, values = learn(
        lambda step, seen, action: (float(step == 1), step == 1), False, policy=small_policy(name), segment_length=4,
        **PIXELS)
    # The second step shows a dark frame after a bright one; the first, two bright ones. Learned on just those.
    assert values[1] == pytest.approx(0.5, abs=0.15)


def test_the_gradient_is_cut_to_its_largest_norm():
    torch.manual_seed(0)
    envs, policy = ProbeEnvs(lambda step, seen, action: (float(action), True), True), TinyPolicy()
    frames = torch.from_numpy(envs.frames())
    rollout = rollout_for(envs, policy, frames)
    collect(envs, policy, rollout, frames, 1.0, FP32)
    before = nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    compute_advantages(rollout, 0.99, 0.95)
    metrics = update(
        policy, torch.optim.SGD(policy.parameters(), lr=1.0), rollout,
        PPO(update_epochs=1, num_minibatches=1, max_grad_norm=0.01), 0.0, FP32, torch.Generator())
    step = nn.utils.parameters_to_vector(policy.parameters()).detach() - before
    assert float(step.norm()) == pytest.approx(0.01, rel=1e-3)
    assert metrics["grad_norm"] > 0.02  # before it was cut


def test_first_minibatch_has_ratio_one():
    """Nothing has changed since the decisions were drawn, so KL and clip fraction of the first minibatch are 0."""
    envs = ProbeEnvs(lambda step, seen, action: (float(action), True), True)
    policy = TinyPolicy()
    frames = torch.from_numpy(envs.frames())
    rollout = rollout_for(envs, policy, frames)
    collect(envs, policy, rollout, frames, 1.0, FP32)
    compute_advantages(rollout, 0.99, 0.95)
    ppo = PPO(update_epochs=1, num_minibatches=1)
    before = [p.clone() for p in policy.parameters()]
    metrics = update(
        policy, torch.optim.Adam(policy.parameters(), lr=1e-2), rollout, ppo, 0.0, FP32,
        torch.Generator().manual_seed(0))
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert any(not torch.equal(p, q) for p, q in zip(before, policy.parameters(), strict=True))


def changes(name, rollout, device, bf16):
    """What one minibatch of plain gradient descent changes in the policy's parameters, as one vector."""
    policy = small_policy(name).to(device)
    before = nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    moved = {key: {k: t.to(device) for k, t in value.items()} if key == "frame_store" else value.to(device)
             for key, value in vars(rollout).items()}
    rollout = Rollout(**moved)
    compute_advantages(rollout, 0.99, 0.95)
    update(policy, torch.optim.SGD(policy.parameters(), lr=1.0), rollout,
           PPO(update_epochs=1, num_minibatches=1), 0.01, torch.autocast(device, torch.bfloat16, enabled=bf16),
           torch.Generator().manual_seed(0))
    return (nn.utils.parameters_to_vector(policy.parameters()).detach() - before).cpu()


@pytest.mark.parametrize("name", POLICIES)
def test_an_update_is_the_same_in_every_precision_and_on_every_device(name):
    policy, envs = small_policy(name), ProbeEnvs(
        lambda step, seen, action: (float(action) * seen, True), True, shape=PIXELS["shape"])
    frames = torch.from_numpy(envs.frames())
    rollout = rollout_for(envs, policy, frames, stack=2)
    collect(envs, policy, rollout, frames, 1.0, FP32)
    exact = changes(name, rollout, "cpu", bf16=False)
    assert exact.norm() > 0.01
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for bf16, tolerance in ((False, 1e-3), (True, 5e-2)):
            error = changes(name, rollout, device, bf16) - exact
            assert error.norm() < tolerance * exact.norm(), (device, bf16)


def test_target_kl_ends_an_update_early():
    envs, policy = ProbeEnvs(lambda step, seen, action: (float(action), True), True), TinyPolicy()
    frames = torch.from_numpy(envs.frames())
    rollout = rollout_for(envs, policy, frames)
    collect(envs, policy, rollout, frames, 1.0, FP32)
    compute_advantages(rollout, 0.99, 0.95)

    class Counting(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

    def steps(**settings):
        optimizer = Counting(policy.parameters(), lr=0.0)
        ppo = PPO(update_epochs=3, num_minibatches=4, **settings)
        batch = Rollout(**{**vars(rollout), "log_probs": rollout.log_probs - 1})  # KL of e - 2 from the start
        update(policy, optimizer, batch, ppo, 0.0, FP32, torch.Generator().manual_seed(0))
        return optimizer.steps

    assert steps() == 12
    assert steps(target_kl=0.5) == 4


def test_nan_stops_before_the_optimizer_step():
    policy, rollout = TinyPolicy(), empty_rollout(4, 2)
    before = [p.clone() for p in policy.parameters()]
    rollout.advantages[:] = float("nan")
    with pytest.raises(FloatingPointError, match="loss nan"):
        update(policy, torch.optim.Adam(policy.parameters()), rollout, PPO(num_minibatches=1), 0.0, FP32,
               torch.Generator())
    assert all(torch.equal(p, q) for p, q in zip(before, policy.parameters(), strict=True))
