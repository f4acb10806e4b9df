from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from lander import Lander
from layers import PLACE_WIDTH, PLACES, AttentionPool, ChangeConv, MirrorConv, PixelConv, mirror_image, take
from machinery.config import ConfigError, check_config, load_config
from models import (
    POLICIES,
    Categorical,
    DiagonalGaussian,
    Policy,
    Spaces,
    TemporalResNet,
    WeightsError,
    make_policy,
)
from task import ACTIONS, MIRRORED_ACTIONS

ATTENTION = {"eye": "none", "pooling": "attention"}
SPACES = Spaces(4, 3, 100, 150, num_actions=len(ACTIONS), mirrored_actions=MIRRORED_ACTIONS)
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


def answer(policy, frame_store, frame_ids):
    """(logits, value)"""
    output = policy(frame_store, frame_ids)
    return output.distribution.logits, output.value


def calibrated(name, frames, **options):
    torch.manual_seed(0)
    policy = make_policy(POLICIES[name].Options(**options), SPACES)
    if policy.options.eye == "learned":
        policy.eye.calibrate = partial(policy.eye.calibrate, steps=1)
    policy.calibrate(frames)
    return policy.eval()


def test_pictures_are_taken_as_they_are_or_in_the_mirror():
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 2, 3, 4), dtype=np.uint8))
    both = torch.stack([pictures, pictures.flip(3)], 1)
    taken = take(both, torch.tensor([9, 0, 8]))
    assert torch.equal(taken, torch.stack([pictures[4].flip(2), pictures[0], pictures[4]]))
    assert torch.equal(take(pictures[:, None], torch.tensor([8, 0])), pictures[[4, 0]])


def test_a_convolution_of_pixels_is_that_of_scaled_pixels():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 6, 9, 8), dtype=np.uint8)).float()
    conv = PixelConv(6, 4, 3, stride=2)
    expected = F.conv2d(pixels / 255 - 0.25, conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(conv(pixels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_shapes_and_dtypes(name, frames):
    policy = calibrated(name, frames)
    output = policy(*policy.preprocess_stacks(frames))
    logits, value = output.distribution.logits, output.value
    assert logits.shape == (24, 4)
    assert value.shape == (24,)
    assert logits.dtype == value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rough = policy(*policy.preprocess_stacks(frames)).distribution.logits
    assert rough.dtype == torch.float32
    assert (rough - logits).abs().max() < 0.05


@pytest.mark.parametrize("pooling", ["flatten", "attention"])
@pytest.mark.parametrize("name", POLICIES)
def test_whole_gray_frames_without_the_eye(name, pooling, frames):
    options = POLICIES[name].Options(eye="none", mirror=False, pooling=pooling)
    policy = make_policy(options, Spaces(2, 1, 50, 75, num_actions=4))
    gray = frames[:5, :2, ::2, ::2]
    policy.calibrate(gray)
    output = policy.eval()(*policy.preprocess_stacks(gray))
    assert (output.distribution.logits.shape, output.value.shape) == ((5, 4), (5,))


@pytest.mark.parametrize("pooling", ["flatten", "attention"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("width", [37, 38, 40])
def test_whole_frames_in_the_mirror_give_mirrored_actions(width, name, pooling, frames):
    """Without an eye the policy is the mean of two views, whatever its weights and the frames' width are."""
    torch.manual_seed(0)
    small = {"width": 32} if name != "cnn" else {}
    options = POLICIES[name].Options(eye="none", pooling=pooling, **small)
    policy = make_policy(
        options, Spaces(4, 3, 25, width, num_actions=4, mirrored_actions=MIRRORED_ACTIONS)).eval()
    nn.init.normal_(policy.actor.weight)
    small = F.pad(frames[:6, :, ::4, ::4], (0, width - 38))
    with torch.no_grad():
        logits, value = answer(policy, *policy.preprocess_stacks(small))
        mirrored_logits, mirrored_value = answer(policy, *policy.preprocess_stacks(small.flip(3)))
    assert (logits.shape, value.shape) == ((6, 4), (6,))
    close = 1e-5 if pooling == "flatten" else 1e-4  # how places change is scaled up, with its rounding
    torch.testing.assert_close(mirrored_logits[:, [0, 3, 2, 1]], logits, atol=close, rtol=close)
    torch.testing.assert_close(mirrored_value, value, atol=close, rtol=close)
    assert (logits[:, 1] - logits[:, 3]).abs().max() > 1e-3


def test_attention_pools_what_is_at_a_place_wherever_it_is():
    """Moved by so many pixels, a pattern is found as many farther, and what is said of it stays the same."""
    torch.manual_seed(0)
    pool = AttentionPool(channels=5)
    nn.init.normal_(pool.query.weight, std=10)  # sure of what it looks for
    maps = torch.zeros(3, 5, 12, 16)
    pattern = 5 * torch.randn(5, 2, 2)
    maps[0, :, 3:5, 2:4] = maps[1, :, 3:5, 9:11] = maps[2, :, 8:10, 2:4] = pattern
    what, where = pool(maps).split([PLACES * PLACE_WIDTH, 2 * PLACES], 1)
    found = (where.view(3, PLACES, 2)[0] - torch.tensor([2.5 / 7.5 - 1, 3.5 / 5.5 - 1])).abs().amax(1) < 0.1
    assert found.any()  # others look for something else, such as where nothing is
    torch.testing.assert_close(what[1], what[0])
    torch.testing.assert_close(what[2], what[0])
    moved = where.view(3, PLACES, 2)[:, found]
    torch.testing.assert_close(moved[1] - moved[0], torch.tensor([7 / 7.5, 0.0]).expand_as(moved[0]), atol=0.01, rtol=0)
    torch.testing.assert_close(moved[2] - moved[0], torch.tensor([0.0, 5 / 5.5]).expand_as(moved[0]), atol=0.01, rtol=0)
    assert (pool(maps[:, :, :1, :1])[:, -2 * PLACES :] == 0).all()  # a map of one place has no other


def test_a_convolution_of_changes_is_one_of_their_differences():
    torch.manual_seed(0)
    conv = ChangeConv(3, 2, 4, 5, padding=2)
    pictures = torch.randint(0, 256, (2, 6, 9, 11)).float()
    first, second, newest = pictures.chunk(3, dim=1)
    seen = torch.cat([newest, 2 * (second - first), 2 * (newest - second)], 1) / 255
    torch.testing.assert_close(conv(pictures), F.conv2d(seen, conv.weight, conv.bias, padding=2))
    still = torch.cat([newest] * 3, 1)
    other = torch.cat([newest + 7] * 3, 1)
    assert not torch.allclose(conv(still), conv(other))  # the newest frame is seen, too


@pytest.mark.parametrize("width", [14, 15])
def test_maps_of_a_mirrored_picture_are_the_mirrored_maps_of_the_picture(width):
    torch.manual_seed(0)
    sizes = {14: {"kernel_size": 4, "padding": 1}, 15: {"kernel_size": 5, "padding": 2}}[width]
    first = ChangeConv(2, 3, 8, stride=2, mirror=True, **sizes)
    convs = nn.Sequential(first, nn.ReLU(), MirrorConv(8, 6, 3, padding=1), nn.ReLU(), MirrorConv(6, 4, 3))
    nn.init.normal_(convs[2].bias, std=0.1)
    pictures = torch.randint(0, 256, (2, 6, 10, width)).float()
    maps = convs(pictures)
    torch.testing.assert_close(convs(pictures.flip(3)), mirror_image(maps))
    assert not torch.allclose(maps, mirror_image(maps))


def test_attention_over_changes_needs_two_frames(frames):
    with pytest.raises(ConfigError, match=r"model\.pooling=attention .* env\.frame_stack"):
        load_config(None, ["model.eye=none", "model.pooling=attention", "env.frame_stack=1"])


def test_auxiliary_losses_get_the_features_of_the_minibatch_alone(frames):
    """Without an eye, features are those of two views; a loss is asked about the decisions once."""
    policy = make_policy(POLICIES["cnn"].Options(eye="none", pooling="attention"), SPACES)
    frame_store, frame_ids = policy.preprocess_stacks(frames[:2])
    policy.losses = lambda features, minibatch: {"count": torch.tensor(len(features))}
    output = policy(frame_store, frame_ids, SimpleNamespace(frame_store=frame_store, frame_ids=frame_ids))
    assert output.losses["count"] == 2


@pytest.mark.parametrize("name", POLICIES)
def test_a_learned_eye_goes_on_learning_with_its_policy(name, frames):
    torch.manual_seed(0)
    policy = make_policy(POLICIES[name].Options(eye="learned"), SPACES).train()
    before = [parameter.clone() for parameter in policy.eye.parameters()]
    policy.eye.calibrate = partial(policy.eye.calibrate, steps=1)
    policy.calibrate(frames)
    assert any(not torch.equal(p, q) for p, q in zip(before, policy.eye.parameters(), strict=True))
    frame_store, frame_ids = policy.preprocess_stacks(frames)
    assert policy(frame_store, frame_ids).losses == {}
    losses = policy(frame_store, frame_ids, SimpleNamespace(frame_store=frame_store, frame_ids=frame_ids)).losses
    assert list(losses) == ["eye"]
    losses["eye"].backward()
    learning = {key for key, parameter in policy.named_parameters() if parameter.grad is not None}
    assert learning == {key for key, _ in policy.named_parameters() if key.startswith("eye.")}
    groups = [(group["lr_scale"], len(group["params"])) for group in policy.parameter_groups()]
    assert (0.004, len(learning)) in groups
    assert sum(count for _, count in groups) == len(list(policy.parameters()))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_sees_time_and_space(name, frames):
    policy = calibrated(name, frames)
    with torch.no_grad():
        value = policy(*policy.preprocess_stacks(frames)).value
        backwards = frames.unflatten(1, (4, 3)).flip(1).flatten(1, 2)
        moved = frames.roll(10, dims=3)
        assert (policy(*policy.preprocess_stacks(backwards)).value - value).abs().max() > 1e-3
        assert (policy(*policy.preprocess_stacks(moved)).value - value).abs().max() > 1e-3


@pytest.mark.parametrize("name", POLICIES)
def test_the_order_of_older_frames_matters_and_so_do_their_pixels(name, frames):
    policy = calibrated(name, frames)
    with torch.no_grad():
        frame_store, frame_ids = policy.preprocess_stacks(frames[10:])
        value = policy(frame_store, frame_ids).value
        assert (policy(frame_store, frame_ids[:, [1, 0, 2, 3]]).value - value).abs().max() > 1e-4
        darker = frames[10:].clone()
        darker[:, :3] //= 2  # the oldest frame
        assert (policy(*policy.preprocess_stacks(darker)).value - value).abs().max() > 1e-4


@pytest.mark.parametrize(
    "options", [{}, {"tilt": True}, {"eye": "learned", "glimpses": 2}], ids=["one", "tilt", "two"])
@pytest.mark.parametrize("name", POLICIES)
def test_mirrored_glimpses_give_mirrored_actions(name, options, frames):
    """Left and right engines swap; the value stays."""
    policy = calibrated(name, frames, **options)
    nn.init.normal_(policy.actor.weight)
    frame_store, frame_ids = policy.preprocess_stacks(frames)
    other, _ = policy.preprocess_stacks(frames)
    other["pictures"] = other["pictures"].flip(4)
    turned = [-1.0, 1.0, -1.0, 1.0] if policy.options.tilt else [-1.0, 1.0]
    other["positions"] = other["positions"] * torch.tensor(turned).repeat(policy.options.glimpses)
    with torch.no_grad():
        logits, value = answer(policy, frame_store, frame_ids)
        mirrored_logits, mirrored_value = answer(policy, other, frame_ids)
    torch.testing.assert_close(mirrored_logits[:, [0, 3, 2, 1]], logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mirrored_value, value, atol=1e-5, rtol=1e-5)
    assert (logits[:, 1] != logits[:, 3]).all()


@pytest.mark.parametrize("name", POLICIES)
def test_what_an_eye_says_of_a_frame_in_which_it_sees_nothing_does_not_count(name, frames):
    """It is then where it was last seen, or else first will be; at 0 if never. Whether it is seen stays."""
    policy = calibrated(name, frames, tilt=True)
    said = torch.tensor([[0.1, 0.2, 0.3, 1], [9, 9, 9, 0], [0.4, 0.5, 0.6, 1], [8, 8, 8, 0]])
    frame_ids = torch.tensor([[0, 1, 2, 3], [1, 3, 2, 0], [1, 3, 1, 3]])
    measures = policy.measures({"positions": said}, frame_ids)
    assert measures[..., 3].tolist() == [[1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    first, second, nothing = said[0, :3], said[2, :3], torch.zeros(3)
    expected = [[first, first, second, second], [second, second, second, first], [nothing] * 4]
    torch.testing.assert_close(measures[..., :3], torch.stack([torch.stack(row) for row in expected]))
    left = {"positions": said * torch.tensor([-1, 1, 1, 1])}
    assert policy.mirrored(left, frame_ids).tolist() == [True, True, False]


@pytest.mark.parametrize("name", POLICIES)
def test_with_a_tilt_decisions_read_it_beside_the_features(name, frames):
    policy = calibrated(name, frames, tilt=True).eval()
    frame_store, frame_ids = policy.preprocess_stacks(frames)
    with torch.no_grad():
        mirrored = policy.mirrored(frame_store, frame_ids)
        features, inputs = (see(frame_store, frame_ids, mirrored) for see in (policy.features, policy.inputs))
        before = policy(frame_store, frame_ids).value
        frame_store["positions"][frame_ids[:, -1], 2] += 0.1
        after, changed = policy(frame_store, frame_ids).value, policy.inputs(frame_store, frame_ids, mirrored)
    torch.testing.assert_close(inputs[:, : features.shape[1]], features)
    assert inputs.shape[1] == features.shape[1] + policy.options.features
    seen = frame_store["positions"][frame_ids[:, -1], 3] > 0
    assert torch.equal(before != after, seen)
    assert torch.equal((inputs != changed)[:, features.shape[1] :].any(1), seen)


@pytest.mark.parametrize("name", POLICIES)
def test_the_places_attended_to_are_those_of_the_picture_also_if_it_is_seen_in_the_mirror(name, frames):
    policy = calibrated(name, frames, pooling="attention").eval()
    (frame_store, frame_ids), (other, _) = (policy.preprocess_stacks(frames) for _ in range(2))
    other["pictures"] = other["pictures"].flip(4)
    other["positions"] = other["positions"] * torch.tensor([-1.0, 1.0])
    with torch.no_grad():
        there, turned = policy.attended(frame_store, frame_ids), policy.attended(other, frame_ids)
    assert there.shape == (len(frames), PLACES, 2)
    assert policy.mirrored(frame_store, frame_ids).float().mean() not in (0, 1)
    torch.testing.assert_close(turned * torch.tensor([-1.0, 1.0]), there, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"tilt": True}, ATTENTION], ids=["eye", "tilt", "attention"])
@pytest.mark.parametrize("name", POLICIES)
def test_frames_shared_by_stacks_give_what_separate_stacks_give(name, options, frames):
    """Stacks that point into common rows, in either mode, and each stack by itself: the same function."""
    policy = calibrated(name, frames, **options)
    nn.init.normal_(policy.actor.weight)
    singles = frames[:, -3:]
    frame_ids = torch.arange(4) + torch.arange(len(singles) - 3)[:, None]  # (21, 4): neighbours share three frames
    with torch.no_grad():
        alone = answer(policy, *policy.preprocess_stacks(singles[frame_ids].flatten(1, 2)))
        frame_store = policy.preprocess(singles)
        for _ in range(2):  # the second time from memory, where a policy has one
            for ours, theirs in zip(answer(policy, frame_store, frame_ids), alone, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        learning = answer(policy.train(), policy.preprocess(singles), frame_ids)
    for ours, theirs in zip(learning, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["temporal_resnet", "transformer"])
def test_a_frame_is_encoded_once(name, frames, monkeypatch):
    policy = calibrated(name, frames, mirror=False)
    encoded = []
    encoder = type(policy).encoder
    monkeypatch.setattr(type(policy), "encoder", lambda self, maps: encoded.append(len(maps)) or encoder(self, maps))
    frame_store = policy.preprocess(frames[:, -3:])
    frame_ids = torch.arange(4) + torch.arange(21)[:, None]
    with torch.no_grad():
        for row in frame_ids:
            policy(frame_store, row[None])
    assert sum(encoded) == 24  # collecting: four for the first stack, one for each that follows
    encoded.clear()
    policy.train()(frame_store, frame_ids)
    assert encoded == [24]  # learning: each once for all stacks of the minibatch


@pytest.mark.parametrize("name", POLICIES)
def test_overfits_a_tiny_batch(name, frames):
    policy = calibrated(name, frames).train()
    frame_store, frame_ids = policy.preprocess_stacks(frames)
    actions, values = torch.arange(24) % 4, torch.linspace(-1, 1, 24)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for _ in range(200):
        logits, value = answer(policy, frame_store, frame_ids)
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
    frame_store, frame_ids = policy.preprocess_stacks(frames)
    for _ in range(3):  # the first residual branches start at zero, and what is behind them moves a step later
        logits, value = answer(policy, frame_store, frame_ids)
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
    frame_store = policy.preprocess(frames[:, -3:])
    plain = Policy.preprocess(policy, frames[:, -3:])["pictures"][:, 0].float() / 255
    both = torch.stack([plain, plain.flip(3)], 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        maps = policy.resnet["layer1"](policy.resnet["stem"]((both - policy.mean) / policy.std))
    assert torch.equal(frame_store["pictures"].flatten(0, 1), maps)


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
        TemporalResNet.Options(weights=str(tmp_path / "resnet18.pth"), depth="layer4", enlarge=2), SPACES)
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
        make_policy(TemporalResNet.Options(weights=str(file)), SPACES).load_pretrained()
    file.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        make_policy(TemporalResNet.Options(weights=str(file)), SPACES).load_pretrained()
    with pytest.raises(WeightsError, match="IMAGENET1K_V1"):
        make_policy(TemporalResNet.Options(weights="IMAGENET"), SPACES).load_pretrained()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing downloaded earlier
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # and no way out
    with pytest.raises(WeightsError, match=r"cannot be had.*model\.weights=FILE"):
        make_policy(TemporalResNet.Options(weights="IMAGENET1K_V1"), SPACES).load_pretrained()
    broken = tmp_path / "hub" / "checkpoints" / torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_bytes(b"half a downlo")
    with pytest.raises(WeightsError, match=r"cannot be had.*model\.weights=FILE") as error:
        make_policy(TemporalResNet.Options(weights="IMAGENET1K_V1"), SPACES).load_pretrained()
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
    policy = make_policy(config.model, SPACES).eval()
    assert answer(policy, *policy.preprocess_stacks(frames[:2]))[0].shape == (2, 4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_build_their_policy(path):
    config = load_config(path)
    make_policy(config.model, SPACES)


def test_gaussian_is_that_of_torch_and_can_be_sampled_from_generators_of_its_own():
    torch.manual_seed(0)
    mean, log_std, actions = torch.randn(5, 2), torch.tensor([-0.5, 0.3]), torch.randn(5, 2)
    ours, theirs = DiagonalGaussian(mean, log_std), torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions).sum(-1))
    torch.testing.assert_close(ours.entropy(), theirs.entropy().sum(-1))
    assert torch.equal(ours.mode(), mean)
    many = DiagonalGaussian(mean[:1].expand(20_000, 2), log_std)
    for drawn in (many.sample(), many.sample([np.random.default_rng(i) for i in range(20_000)])):
        assert drawn.dtype == torch.float32
        torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.03, rtol=0)
        torch.testing.assert_close(drawn.std(0), log_std.exp(), atol=0.03, rtol=0)
    # Of N(0, 1) at 0 and at 1, by hand: log(1 / sqrt(2 pi)) = -0.919 and half less.
    hand = DiagonalGaussian(torch.zeros(1, 1), torch.zeros(1))
    assert hand.log_prob(torch.tensor([[0.0]])).item() == pytest.approx(-0.91894, abs=1e-5)
    assert hand.log_prob(torch.tensor([[1.0]])).item() == pytest.approx(-1.41894, abs=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_mirrored_glimpses_give_mirrored_thrusts(name, frames):
    """The side engine's sign turns, the main engine and the value stay."""
    torch.manual_seed(0)
    policy = make_policy(POLICIES[name].Options(), Spaces(4, 3, 100, 150, 2, (1, -1), continuous=True))
    policy.calibrate(frames)
    nn.init.normal_(policy.eval().actor.weight)
    frame_store, frame_ids = policy.preprocess_stacks(frames)
    other, _ = policy.preprocess_stacks(frames)
    other["pictures"] = other["pictures"].flip(4)
    other["positions"] = other["positions"] * torch.tensor([-1.0, 1.0])
    with torch.no_grad():
        one, mirrored = policy(frame_store, frame_ids), policy(other, frame_ids)
    assert one.distribution.mean.shape == (24, 2)
    torch.testing.assert_close(
        mirrored.distribution.mean * torch.tensor([1, -1]), one.distribution.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mirrored.value, one.value, atol=1e-5, rtol=1e-5)


def test_categorical_is_that_of_torch_and_can_be_sampled_from_generators_of_its_own():
    torch.manual_seed(0)
    logits = 2 * torch.randn(5, 4)
    ours, theirs = Categorical(logits), torch.distributions.Categorical(logits=logits)
    actions = torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.probs.float(), theirs.probs)
    assert torch.equal(ours.mode(), theirs.probs.argmax(-1))
    many = Categorical(logits[:1].expand(20_000, 4))
    for drawn in (many.sample(), many.sample([np.random.default_rng(i) for i in range(20_000)])):
        shares = torch.bincount(drawn, minlength=4) / 20_000
        torch.testing.assert_close(shares, theirs.probs[0], atol=0.015, rtol=0)
    again = [ours.sample([np.random.default_rng(i) for i in range(5)]).tolist() for _ in range(2)]
    assert again[0] == again[1]
