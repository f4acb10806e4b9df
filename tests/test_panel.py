"""The instrument panel shows what the policy really put out, and costs nothing when it fails."""

import json

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from test_evaluate import run_main

import evaluate
from envs import make_env
from layers import PLACES
from machinery import panel
from machinery.checkpoint import build_policy, load_policy
from machinery.config import load_config
from machinery.panel import BOX, FRAME_TOP, MARGIN, STACK_TOP, Panel, look_inside
from machinery.video import VideoRecorder

POLICIES = {
    "cnn": [],
    "whole gray frames": [
        "env.color=false", "env.shrink_factor=8", "model.eye=none", "model.mirror=false", "env.frame_stack=16"],
    "temporal_resnet": ["model.name=temporal_resnet"],
    "frozen stem": ["model.name=temporal_resnet", "model.frozen=stem"],
    "transformer": ["model.name=transformer", "model.heads=8"],
    "attention": ["model.eye=none", "model.pooling=attention"],
    "two glimpses": ["model.eye=learned", "model.glimpses=2", "env.color=false"],
    "transformer with attention": ["model.name=transformer", "model.eye=none", "model.pooling=attention"],
}


def policy_and_frames(overrides, decisions=6):
    """A policy whose actions differ, and the stack that it sees after some decisions."""
    torch.manual_seed(3)
    config = load_config(None, overrides)
    policy = build_policy(config).eval()
    if config.model.eye == "colour":
        policy.eye.direction.copy_(torch.tensor([0.33, -0.81, 0.48]))
    torch.nn.init.normal_(policy.actor.weight)
    lander = make_env(**config.env.settings())
    frames = lander.reset(1_000_003)
    for i in range(decisions):
        frames = lander.step(i % 4)[0]
    return policy, config, frames


@pytest.mark.parametrize("overrides", [POLICIES["cnn"], POLICIES["transformer"]], ids=["cnn", "transformer"])
@pytest.mark.parametrize("mirror", ["true", "false"])
def test_saliency_is_the_slope_of_the_chosen_logit(overrides, mirror):
    policy, _, frames = policy_and_frames([*overrides, f"model.mirror={mirror}"])
    action, frames = 3, torch.from_numpy(frames)
    insight = look_inside(policy, frames, action)
    assert insight.saliency.shape == (32, 32)

    def logit(y, x, plane, change):
        frame_store, frame_ids = policy.preprocess_stacks(frames[None])
        frame_store["pictures"] = frame_store["pictures"].double()
        frame_store["pictures"][-1, 0, plane, y, x] += change
        if policy.options.mirror:
            frame_store["pictures"][-1, 1, plane, y, -1 - x] += change
        with torch.no_grad():
            return float(policy(frame_store, frame_ids).distribution.logits[0, action])

    brightest = np.stack(np.unravel_index(np.argsort(insight.saliency, axis=None)[-3:], (32, 32)), 1)
    for y, x in [*brightest.tolist(), [2, 30]]:
        slopes = [abs(logit(y, x, plane, 0.5) - logit(y, x, plane, -0.5)) for plane in range(3)]
        assert insight.saliency[y, x] == pytest.approx(max(slopes), rel=0.05, abs=2e-5)


@pytest.mark.parametrize("name", ["temporal_resnet", "transformer"])
def test_attention_is_that_of_the_newest_step_in_the_last_layer(name):
    policy, _, frames = policy_and_frames(POLICIES[name])
    frames, inputs = torch.from_numpy(frames), []
    insight = look_inside(policy, frames, 0)
    layer = policy.over_time.layers[-1]
    layer.register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        policy(*policy.preprocess_stacks(frames[None]))
    steps, heads = layer.norm1(inputs[0])[0], policy.options.heads  # (S, width)
    attention = layer.self_attn
    query, key, _ = (steps @ attention.in_proj_weight.T + attention.in_proj_bias).view(4, 3, heads, -1).unbind(1)
    scores = torch.einsum("hd,shd->hs", query[-1], key) / key.shape[-1] ** 0.5
    assert insight.attention.shape == (heads, 4)
    torch.testing.assert_close(torch.from_numpy(insight.attention), scores.softmax(1), atol=1e-5, rtol=1e-4)
    calls = []
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    policy(*policy.preprocess_stacks(frames[None]))
    assert len(calls) == 1  # that of the decision itself: looking inside left nothing behind


@pytest.mark.parametrize("overrides", POLICIES.values(), ids=POLICIES)
def test_the_panel_draws_what_the_policy_put_out(overrides):
    policy, config, frames = policy_and_frames(overrides)
    with torch.no_grad():
        output = policy(*policy.preprocess_stacks(torch.from_numpy(frames)[None]))
    value, logits = output.value, output.distribution.logits
    probabilities, action = logits[0].softmax(-1).numpy(), int(logits[0].argmax())
    drawing = Panel(policy, config, "title")
    drawing.decide(frames, probabilities, float(value), action, 12.5, 24)

    np.testing.assert_allclose([bar.get_width() for bar in drawing.bars], probabilities, rtol=1e-6)
    assert [i for i, bar in enumerate(drawing.bars) if bar.get_facecolor()[1] > 0.7] == [action]
    assert drawing.labels[action].get_text() == f"{probabilities[action]:.0%}"
    returns, values = (curve.get_ydata() for curve in drawing.curves)
    assert (list(returns), list(values)) == ([12.5], [pytest.approx(float(value) / config.ppo.reward_scale)])
    insight = look_inside(policy, torch.from_numpy(frames), action)
    assert len(drawing.attention) == (0 if insight.attention is None else 4)
    for bars, weights in zip(drawing.attention, () if insight.attention is None else insight.attention.T, strict=True):
        np.testing.assert_allclose([bar.get_height() for bar in bars], weights, rtol=1e-5)

    rendered = np.random.default_rng(0).integers(0, 255, (400, 600, 3), np.uint8)
    picture = drawing.picture(rendered)
    assert picture.dtype == np.uint8
    assert picture.shape == (drawing.height, drawing.width, 3)
    assert drawing.height % 16 == drawing.width % 16 == 0
    assert (picture[FRAME_TOP : FRAME_TOP + 400, MARGIN : MARGIN + 600] == rendered).all()
    newest = frames[-policy.spaces.planes :].transpose(1, 2, 0)
    width, height = drawing.frame_size
    shown = picture[STACK_TOP : STACK_TOP + height, drawing.columns[-2] :][:, :width]
    if config.model.glimpses == 1:  # an eye that never learned may look at a corner for its second
        assert (shown[0, 0] == newest[0, 0]).all()
        assert (shown[-1, -1] == newest[-1, -1]).all()
    if config.model.pooling == "attention":
        assert insight.places.shape == (PLACES, 2)
        column, row = np.rint((insight.places[0] + 1) / 2 * (np.array([width, height]) - 1)).astype(int)
        around = shown[max(row - 5, 0) : row + 6, max(column - 5, 0) : column + 6]
        assert (around == BOX).all(2).sum() > 5  # a ring
    if policy.eye:
        cutouts = insight.pictures[-1]
        assert len(insight.corners[-1]) == config.model.glimpses
        for i, (x, y) in enumerate(insight.corners[-1]):
            column, row = np.rint(np.array([x, y]) * width / newest.shape[1]).astype(int)
            assert (shown[row, column] == BOX).all()  # the corner of its frame
            cutout = cv2.getRectSubPix(newest.astype(np.float32), (32, 32), (x + 15.5, y + 15.5))
            assert np.abs(cutout.reshape(32, 32, -1) - cutouts[32 * i : 32 * (i + 1)]).max() < 1
        width, height = drawing.picture_size
        shown = picture[drawing.picture_top : drawing.picture_top + height, drawing.columns[-2] :][:, :width]
        rows, columns = (((np.arange(n) + 0.5) * size / n).astype(int)
                         for n, size in zip(cutouts.shape[:2], (height, width), strict=True))
        assert (shown[np.ix_(rows, columns)] == cutouts).all()


def test_a_long_and_a_bad_episode_stay_within_the_axes():
    policy, config, frames = policy_and_frames([])
    drawing = Panel(policy, config, "title")
    for step, episode_return in ((0, 0.0), (600, -450.0), (996, -700.0)):
        drawing.decide(frames, np.full(4, 0.25), 0.0, 0, episode_return, step)
    drawing.end(-800.0, 1000, "crash")
    (left, right), (low, high) = drawing.trace.get_xlim(), drawing.trace.get_ylim()
    assert left == 0
    assert right >= 20
    assert low < -800
    assert high > 300
    assert drawing.clock.get_text() == "step 1000, 20.00 s: crash"


def test_the_command_films_the_panel_beside_the_landing(policy_file, tmp_path):
    done = run_main("--checkpoint", policy_file, "--episodes", 1, "--seed", 1000007, "--videos", 1, "--panel",
                    "--webp", tmp_path / "panel.webp", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {"seed-1000007.mp4", "seed-1000007-panel.mp4"}
    plain, film = (imageio_ffmpeg.read_frames(str(tmp_path / "videos" / f"seed-1000007{end}.mp4"))
                   for end in ("", "-panel"))
    next(plain)
    meta = next(film)
    width, height = meta["size"]
    assert (width, meta["fps"], meta["codec"]) == (912, 50, "h264")
    assert "yuv420p" in meta["pix_fmt"]
    plain, film = list(plain), list(film)
    assert len(film) == len(plain)  # both can be watched side by side
    for i in (0, len(plain) // 2, -1):
        inner = np.frombuffer(film[i], np.uint8).reshape(height, width, 3)[FRAME_TOP:, MARGIN:][:400, :600]
        outer = np.frombuffer(plain[i], np.uint8).reshape(400, 600, 3)
        assert np.abs(inner.astype(int) - outer).mean() < 4  # lossy, but the same picture
    assert (tmp_path / "panel.webp").read_bytes()[8:12] == b"WEBP"


def test_a_failing_panel_costs_no_score_and_no_video(policy_file, tmp_path, monkeypatch, capsys):
    policy, config, file = load_policy(policy_file)
    without = evaluate.evaluate(policy, config, file, tmp_path / "a", episodes=2, videos=2)

    def fail(*_):
        raise ValueError("no ink")

    monkeypatch.setattr(panel, "look_inside", fail)
    with_panel = evaluate.evaluate(policy, config, file, tmp_path / "b", episodes=2, videos=2, panel=True)
    assert with_panel["returns"] == without["returns"]
    assert capsys.readouterr().err == "no panel: no ink; scores are not affected\n"
    for seed in (1000000, 1000001):
        a, b = ((tmp_path / folder / "videos" / f"seed-{seed}.mp4").read_bytes() for folder in "ab")
        assert a == b
    assert json.loads((tmp_path / "b" / "report.json").read_text())["episodes"] == 2


def test_numbers_beside_a_frame_belong_to_that_frame(policy_file, monkeypatch):
    """The film shows each frame with the decision that was made on it, not with the one that led to it."""
    class Counter:
        width = height = shown = 0

        def decide(self, *_):
            self.shown += 1

        def end(self, episode_return, step, outcome):
            self.shown = f"end after {step}"

        def picture(self, frame):
            return frame, self.shown

    files = {}
    monkeypatch.setattr(
        VideoRecorder, "_open", lambda self, index, name, width, height, fps: files.setdefault(name, []).append)
    policy, config, _ = load_policy(policy_file)
    recorder = VideoRecorder("nowhere", 1, 1000007, "x", lambda title: Counter())
    _, (length,), _ = evaluate.play(policy, config.env, [1000007], rendered=True, recorder=recorder)
    frames, numbers = zip(*files["x-panel.mp4"], strict=True)
    assert numbers == (*(i // 4 + 1 for i in range(length)), f"end after {length}")
    assert len(files["x.mp4"]) == len(frames) == length + 1
    for plain, beside in zip(files["x.mp4"], frames, strict=True):
        assert (plain == beside).all()
