from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import models
from config import ConfigError, check_config, load_config
from envs import Lander, shrink
from models import POLICIES, CalibrationError, Glimpse, Policy, TemporalResNet, WeightsError, make_policy, take

SHAPE = {"stack": 4, "planes": 3, "height": 100, "width": 150}
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


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
    """A blue square moves over black and white, past yellow flags that do not: the eye must follow it."""
    def picture(x, y):
        frame = torch.zeros(3, 100, 150, dtype=torch.uint8)
        frame[:2, 80:83, 60:65] = frame[:2, 80:83, 90:95] = 200
        frame[:, 90:] = 255
        frame[:, y : y + 6, x : x + 8] = torch.tensor([100, 90, 220], dtype=torch.uint8)[:, None, None]
        return frame

    places = [(20 + 5 * i, 10 + 3 * i) for i in range(12)]
    frames = torch.stack([picture(x, y) for x, y in places])
    eye = Glimpse(32, subpixel=False)
    eye.calibrate(frames[:-1], frames[1:])
    crops, positions = eye(frames)
    assert crops.shape == (12, 3, 32, 32)
    for (x, y), position, crop in zip(places, positions, crops, strict=True):
        assert position[0].item() == pytest.approx((x + 3.5) / 149 * 2 - 1, abs=0.01)
        assert position[1].item() == pytest.approx((y + 2.5) / 99 * 2 - 1, abs=0.01)
        assert (crop[2] == 220).sum() == 48  # all of the square is in the glimpse


def test_glimpse_is_cut_from_the_frame_unchanged(frames):
    policy = calibrated("cnn", frames, subpixel=False)
    newest = frames[:, -3:]
    crops, _ = policy.eye(newest)
    for frame, crop in zip(newest, crops, strict=True):
        windows = frame.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 69, 119, 32, 32)
        assert (windows == crop[:, None, None]).flatten(3).all(3).all(0).any()


def test_subpixel_glimpse_does_not_shake():
    """A shape that moves by quarters of a pixel looks the same in each glimpse, in the middle, at any place."""
    def picture(x, y):
        canvas = np.zeros((400, 600, 3), np.uint8)
        cv2.fillPoly(canvas, [np.int32([(x, y), (x + 40, y + 8), (x + 32, y + 36), (x + 4, y + 28)])], (100, 90, 220))
        return torch.from_numpy(shrink(canvas, 4, color=True))

    frames = torch.stack([picture(200 + 5 * i, 100 + 3 * i) for i in range(16)])
    shaking = {}
    for subpixel in (True, False):
        eye = Glimpse(32, subpixel)
        eye.calibrate(frames[:-1], frames[1:])
        crops, positions = eye(frames)
        crops = crops.float()
        shaking[subpixel] = (crops - crops.mean(0)).abs().mean().item()
        if subpixel:
            assert (eye.centroid(crops / 255) - 15.5).abs().max() < 0.35  # pixels
            steps = positions.diff(dim=0) * torch.tensor([149 / 2, 99 / 2])
            torch.testing.assert_close(steps, torch.tensor([5 / 4, 3 / 4]).expand(15, 2), atol=0.6, rtol=0)
    assert shaking[True] < shaking[False] / 3


def test_glimpse_at_the_edge_stays_inside():
    """Wherever the spot is, in the corners too, the glimpse is a piece of the picture that holds it."""
    for height, width in ((0, 0), (0, 144), (94, 0), (94, 144)):
        pictures = torch.zeros(2, 3, 100, 150, dtype=torch.uint8)
        pictures[0, :, 40:46, 40:46] = pictures[1, :, height : height + 6, width : width + 6] = 255
        eye = Glimpse(32)
        eye.calibrate(pictures[:1], pictures[1:])
        crop = eye(pictures)[0][1]
        assert (crop == 255).sum() == 3 * 36


def test_glimpse_needs_motion(frames):
    with pytest.raises(CalibrationError, match="nothing moves"):
        Glimpse(32).calibrate(frames[:1, -3:], frames[:1, -3:])


def test_pictures_are_taken_as_they_are_or_in_the_mirror():
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 2, 3, 4), dtype=np.uint8))
    taken = take(pictures, torch.tensor([4, 0, 4]), torch.tensor([True, False, False]))
    assert torch.equal(taken, torch.stack([pictures[4].flip(2), pictures[0], pictures[4]]))
    assert torch.equal(take(pictures, torch.tensor([4, 0])), pictures[[4, 0]])


@pytest.mark.parametrize("name", POLICIES)
def test_shapes_and_dtypes(name, frames):
    policy = calibrated(name, frames)
    logits, value = policy(*policy.see(frames))
    assert logits.shape == (24, 4)
    assert value.shape == (24,)
    assert logits.dtype == value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = policy(*policy.see(frames))
    assert rough.dtype == torch.float32
    assert (rough - logits).abs().max() < 0.05


@pytest.mark.parametrize("name", POLICIES)
def test_whole_gray_frames_without_the_eye(name, frames):
    policy = make_policy(POLICIES[name].Options(glimpse=0, mirror=False), stack=2, planes=1, height=50, width=75)
    gray = frames[:5, :2, ::2, ::2]
    policy.calibrate(gray)
    logits, value = policy.eval()(*policy.see(gray))
    assert (logits.shape, value.shape) == ((5, 4), (5,))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_sees_time_and_space(name, frames):
    policy = calibrated(name, frames)
    with torch.no_grad():
        value = policy(*policy.see(frames))[1]
        backwards = frames.unflatten(1, (4, 3)).flip(1).flatten(1, 2)
        moved = frames.roll(10, dims=3)
        assert (policy(*policy.see(backwards))[1] - value).abs().max() > 1e-3
        assert (policy(*policy.see(moved))[1] - value).abs().max() > 1e-3


@pytest.mark.parametrize("name", POLICIES)
def test_the_order_of_older_frames_matters_and_so_do_their_pixels(name, frames):
    policy = calibrated(name, frames)
    with torch.no_grad():
        seen, stacks = policy.see(frames[10:])
        value = policy(seen, stacks)[1]
        assert (policy(seen, stacks[:, [1, 0, 2, 3]])[1] - value).abs().max() > 1e-4
        darker = frames[10:].clone()
        darker[:, :3] //= 2  # the oldest frame
        assert (policy(*policy.see(darker))[1] - value).abs().max() > 1e-4


@pytest.mark.parametrize("name", POLICIES)
def test_mirrored_glimpses_give_mirrored_actions(name, frames):
    """Left and right engines swap; the value stays."""
    policy = calibrated(name, frames)
    nn.init.normal_(policy.actor.weight)
    seen, stacks = policy.see(frames)
    other, _ = policy.see(frames)
    other["pictures"] = other["pictures"].flip(3)
    other["positions"] = other["positions"] * torch.tensor([-1.0, 1.0])
    with torch.no_grad():
        logits, value = policy(seen, stacks)
        mirrored_logits, mirrored_value = policy(other, stacks)
    torch.testing.assert_close(mirrored_logits[:, [0, 3, 2, 1]], logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mirrored_value, value, atol=1e-5, rtol=1e-5)
    assert (logits[:, 1] != logits[:, 3]).all()


@pytest.mark.parametrize("name", POLICIES)
def test_frames_shared_by_stacks_give_what_separate_stacks_give(name, frames):
    """Stacks that point into common rows, in either mode, and each stack by itself: the same function."""
    policy = calibrated(name, frames)
    nn.init.normal_(policy.actor.weight)
    singles = frames[:, -3:]
    stacks = torch.arange(4) + torch.arange(len(singles) - 3)[:, None]  # (21, 4): neighbours share three frames
    with torch.no_grad():
        alone = policy(*policy.see(singles[stacks].flatten(1, 2)))
        seen = policy.look(singles)
        for _ in range(2):  # the second time from memory, where a policy has one
            for ours, theirs in zip(policy(seen, stacks), alone, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        learning = policy.train()(policy.look(singles), stacks)
    for ours, theirs in zip(learning, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["temporal_resnet", "transformer"])
def test_a_frame_is_encoded_once(name, frames, monkeypatch):
    policy = calibrated(name, frames, mirror=False)
    encoded = []
    encoder = type(policy).encoder
    monkeypatch.setattr(type(policy), "encoder", lambda self, maps: encoded.append(len(maps)) or encoder(self, maps))
    seen = policy.look(frames[:, -3:])
    stacks = torch.arange(4) + torch.arange(21)[:, None]
    with torch.no_grad():
        for row in stacks:
            policy(seen, row[None])
    assert sum(encoded) == 24  # collecting: four for the first stack, one for each that follows
    encoded.clear()
    policy.train()(seen, stacks)
    assert encoded == [24]  # learning: each once for all stacks of the minibatch


@pytest.mark.parametrize("name", POLICIES)
def test_overfits_a_tiny_batch(name, frames):
    policy = calibrated(name, frames).train()
    seen, stacks = policy.see(frames)
    actions, values = torch.arange(24) % 4, torch.linspace(-1, 1, 24)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for _ in range(200):
        logits, value = policy(seen, stacks)
        loss = nn.functional.cross_entropy(logits, actions) + ((value - values) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    assert loss < 0.05


def test_frozen_parts_do_not_move_and_learning_parts_do(frames):
    policy = calibrated("temporal_resnet", frames, depth="layer2", frozen="layer1").train()
    before = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    groups = policy.parameter_groups()
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    seen, stacks = policy.see(frames)
    for _ in range(3):  # the first residual branches start at zero, and what is behind them moves a step later
        logits, value = policy(seen, stacks)
        optimizer.zero_grad()
        (logits.sum() + value.sum()).backward()
        optimizer.step()
    for name, parameter in policy.named_parameters():
        frozen = name.startswith(("resnet.stem", "resnet.layer1"))
        assert frozen == (parameter.grad is None), name
        assert frozen == (not parameter.requires_grad), name
    unmoved = {key for key, tensor in policy.state_dict().items() if torch.equal(tensor, before[key])}
    assert {key for key in before if key.startswith(("resnet.stem", "resnet.layer1"))} <= unmoved
    statistics = {key for key in before if "running_" in key or "num_batches" in key}
    assert statistics <= unmoved
    assert {"resnet.layer2.0.conv1.weight", "project.weight", "actor.weight"}.isdisjoint(unmoved)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in policy.parameters())


def test_stored_maps_of_a_frozen_part_equal_recomputation(frames):
    """Bit for bit: the maps that the rollout stores are those of the frozen ResNet, seen plainly and in the mirror."""
    policy = calibrated("temporal_resnet", frames, frozen="layer1")
    seen = policy.look(frames[:, -3:])
    plain = Policy.look(policy, frames[:, -3:])["pictures"].float() / 255
    both = torch.stack([plain, plain.flip(3)], 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        maps = policy.resnet["layer1"](policy.resnet["stem"]((both - policy.mean) / policy.std))
    assert torch.equal(seen["pictures"].flatten(0, 1), maps)


def test_encoder_learning_rate_is_its_own(frames):
    policy = calibrated("temporal_resnet", frames, encoder_learning_rate=0.1)
    scales = {id(p): group["lr_scale"] for group in policy.parameter_groups() for p in group["params"]}
    for name, parameter in policy.named_parameters():
        assert scales[id(parameter)] == (0.1 if name.startswith("resnet.") else 1.0)


def test_pretrained_weights_from_a_file_of_the_true_format(tmp_path, frames):
    torch.manual_seed(1)
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    policy = make_policy(
        TemporalResNet.Options(weights=str(tmp_path / "resnet18.pth"), depth="layer4", enlarge=2), **SHAPE)
    policy.load_pretrained()
    policy.calibrate(frames)  # must leave the statistics of pretrained weights alone
    pictures = torch.rand(2, 3, 64, 64)
    source.eval()
    with torch.no_grad():
        stem = source.maxpool(source.relu(source.bn1(source.conv1(pictures))))
        expected = source.layer4(source.layer3(source.layer2(source.layer1(stem))))
        torch.testing.assert_close(policy.run(policy.resnet, pictures), expected)


def test_weights_that_do_not_fit_or_cannot_be_had(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet50().state_dict(), file)
    with pytest.raises(WeightsError, match=r"weights\.pth: not weights of resnet18"):
        make_policy(TemporalResNet.Options(weights=str(file)), **SHAPE).load_pretrained()
    file.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        make_policy(TemporalResNet.Options(weights=str(file)), **SHAPE).load_pretrained()
    with pytest.raises(WeightsError, match="IMAGENET1K_V1"):
        make_policy(TemporalResNet.Options(weights="IMAGENET"), **SHAPE).load_pretrained()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing downloaded earlier
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # and no way out
    with pytest.raises(WeightsError, match=r"cannot be had.*model\.weights=FILE"):
        make_policy(TemporalResNet.Options(weights="IMAGENET1K_V1"), **SHAPE).load_pretrained()
    broken = tmp_path / "hub" / "checkpoints" / torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_bytes(b"half a downlo")
    with pytest.raises(WeightsError, match=r"cannot be had.*model\.weights=FILE") as error:
        make_policy(TemporalResNet.Options(weights="IMAGENET1K_V1"), **SHAPE).load_pretrained()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [
    {"name": "temporal_resnet", "resnet": "resnet19"},
    {"name": "temporal_resnet", "resnet": "fcn_resnet50"},
    {"name": "temporal_resnet", "depth": "layer1", "frozen": "layer2"},
    {"name": "transformer", "width": 30, "heads": 4},
    {"name": "transformer", "patch": 7},
])
def test_options_that_cannot_be(settings):
    with pytest.raises(ConfigError, match=r"must|should"):
        check_config({"model": settings})


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_any_resnet_of_torchvision_will_do(name, frames):
    config = check_config({"model": {"name": "temporal_resnet", "resnet": name, "depth": "layer2"}})
    policy = make_policy(config.model, **SHAPE).eval()
    assert policy(*policy.see(frames[:2]))[0].shape == (2, 4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_build_their_policy(path):
    config = load_config(path)
    make_policy(config.model, **SHAPE)


def test_a_new_policy_takes_one_class_and_one_line(monkeypatch, frames):
    code = (Path(__file__).parent.parent / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = vars(models).copy()
    exec(compile(code, "README.md", "exec"), names)
    monkeypatch.setitem(POLICIES, "mean", names["Mean"])
    config = check_config({"model": {"name": "mean"}})
    policy = make_policy(config.model, **SHAPE)
    policy.calibrate(frames)
    logits, value = policy(*policy.see(frames))
    assert (logits.shape, value.shape) == ((24, 4), (24,))
