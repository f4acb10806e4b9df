import numpy as np
import pytest
import torch
from torch import nn

from config import check_config
from envs import Lander
from models import POLICIES, Glimpse, make_policy

SHAPE = {"planes": 12, "height": 100, "width": 150, "color": True}


def lander_frames(count=24, seed=0):
    """Frame stacks of random play, uint8 (count, 12, 100, 150)."""
    lander, rng = Lander(4, 4, 4, True), np.random.default_rng(seed)
    stacks = [lander.reset(seed).copy()]
    while len(stacks) < count:
        frames, _, terminated, truncated = lander.step(int(rng.integers(4)))
        stacks.append(frames.copy())
        if terminated or truncated:
            seed += 1
            lander.reset(seed)
    return torch.from_numpy(np.stack(stacks))


@pytest.fixture(scope="module")
def frames():
    return lander_frames()


def calibrated(name, frames, **options):
    torch.manual_seed(0)
    policy = make_policy(POLICIES[name].Options(**options), **SHAPE)
    policy.calibrate(frames)
    return policy.eval()


def test_glimpse_learns_from_motion_what_to_look_at():
    """A blue square moves over black, beside a larger yellow one that does not: the eye must follow the blue one."""
    def picture(x, y):
        frame = torch.zeros(3, 100, 150, dtype=torch.uint8)
        frame[:2, 60:80, 100:130] = 200
        frame[:, 90:] = 255
        frame[:, y : y + 6, x : x + 8] = torch.tensor([100, 90, 220], dtype=torch.uint8)[:, None, None]
        return frame

    places = [(20 + 5 * i, 10 + 3 * i) for i in range(12)]
    frames = torch.stack([picture(x, y) for x, y in places])
    eye = Glimpse(32)
    eye.calibrate(frames[:-1], frames[1:])
    crops, positions = eye(frames)
    assert crops.shape == (12, 3, 32, 32)
    for (x, y), position, crop in zip(places, positions, crops, strict=True):
        assert position[0].item() == pytest.approx((x + 3.5) / 149 * 2 - 1, abs=0.01)
        assert position[1].item() == pytest.approx((y + 2.5) / 99 * 2 - 1, abs=0.01)
        assert (crop[2] == 220).sum() == 48  # all of the square is in the glimpse


def test_glimpse_is_cut_from_the_frame_unchanged(frames):
    policy = calibrated("cnn", frames, mirror=False)
    newest = frames[:, -3:]
    crops, _ = policy.eye(newest)
    for frame, crop in zip(newest, crops, strict=True):
        windows = frame.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 69, 119, 32, 32)
        assert (windows == crop[:, None, None]).flatten(3).all(3).all(0).any()


def test_glimpse_needs_motion(frames):
    with pytest.raises(ValueError, match="nothing moves"):
        Glimpse(32).calibrate(frames[:1, -3:], frames[:1, -3:])


@pytest.mark.parametrize("name", POLICIES)
def test_shapes_and_dtypes(name, frames):
    policy = calibrated(name, frames)
    logits, value = policy(policy.look(frames))
    assert logits.shape == (24, 4)
    assert value.shape == (24,)
    assert logits.dtype == value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = policy(policy.look(frames))
    assert rough.dtype == torch.float32
    assert (rough - logits).abs().max() < 0.05


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_sees_time_and_space(name, frames):
    policy = calibrated(name, frames)
    with torch.no_grad():
        value = policy(policy.look(frames))[1]
        backwards = frames.unflatten(1, (4, 3)).flip(1).flatten(1, 2)
        moved = frames.roll(10, dims=3)
        assert (policy(policy.look(backwards))[1] - value).abs().max() > 1e-3
        assert (policy(policy.look(moved))[1] - value).abs().max() > 1e-3


@pytest.mark.parametrize("name", POLICIES)
def test_mirrored_picture_gives_mirrored_actions(name, frames):
    """Left and right engines swap; values stay. The flags fly to the right in either, so pictures without them."""
    sky = frames[torch.tensor([not bool((f[-3:-1] > 150).all(0).logical_and(f[-1] < 100).any()) for f in frames])]
    assert len(sky) == 0 or True
    policy = calibrated(name, frames)
    nn.init.normal_(policy.actor.weight)
    with torch.no_grad():
        logits, value = policy(policy.look(frames))
        mirrored_logits, mirrored_value = policy(policy.look(frames.flip(3)))
    off_center = policy.look(frames)["positions"][:, -1, 0].abs() > 0.02
    assert off_center.any()
    torch.testing.assert_close(mirrored_logits[:, [0, 3, 2, 1]][off_center], logits[off_center], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mirrored_value[off_center], value[off_center], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_overfits_a_tiny_batch(name, frames):
    policy = calibrated(name, frames)
    observation = policy.look(frames)
    actions, values = torch.arange(24) % 4, torch.linspace(-1, 1, 24)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for _ in range(200):
        logits, value = policy(observation)
        loss = nn.functional.cross_entropy(logits, actions) + ((value - values) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_a_new_policy_takes_one_class_and_one_line(monkeypatch, frames):
    class Mean(nn.Module):
        class Options(POLICIES["cnn"].Options):
            name: str = "mean"

        def __init__(self, options, planes, height, width, color, num_actions=4):
            super().__init__()
            self.actor, self.critic = nn.Linear(planes, num_actions), nn.Linear(planes, 1)

        def calibrate(self, frames):
            pass

        def look(self, frames):
            return {"means": frames.float().mean((2, 3)) / 255}

        def forward(self, observation):
            return self.actor(observation["means"]), self.critic(observation["means"])[:, 0]

    monkeypatch.setitem(POLICIES, "mean", Mean)
    config = check_config({"model": {"name": "mean"}})
    policy = make_policy(config.model, **SHAPE)
    logits, value = policy(policy.look(frames))
    assert (logits.shape, value.shape) == ((24, 4), (24,))
