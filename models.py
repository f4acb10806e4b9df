"""Policies: frames in, (logits, value) out.

    policy = make_policy(options, planes=12, height=100, width=150, color=True)
    observation = policy.look(frames)           # frames uint8 (B, K, H, W) -> dict of tensors (B, ...)
    logits, value = policy(observation)         # float32 (B, num_actions), (B,)

`look` is the part of a policy that does not learn from rewards. It runs once per decision, when frames are collected,
and its result is what a rollout stores; `forward` is what the update differentiates. To add a policy, write a class
with Options, `look` and `forward`, and name it in POLICIES at the end.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn


def orthogonal(layer, gain=2**0.5):
    """Orthogonal weights and zero bias, returned (Andrychowicz et al. 2021, arXiv:2006.05990, sec. 3.2)."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Glimpse(nn.Module):
    """Finds in each frame the spot whose colour is the colour of what moves, and cuts out the picture around it.

    The lander covers 1 % of the picture; what the policy must see of it, its tilt, is a matter of single pixels. Like an
    eye, this looks at the whole picture coarsely, and at one spot finely. Which spot is a colour direction, a vector of
    red, green, blue, found once by `calibrate` from frames alone; attention is the softmax of the pixels' scores.
    """

    def __init__(self, size, stride=4, sharpness=40.0):
        super().__init__()
        self.size, self.stride, self.sharpness = size, stride, sharpness
        self.register_buffer("direction", torch.zeros(3))

    @torch.no_grad()
    def calibrate(self, before, after, threshold=0.1):
        """Fisher's linear discriminant (1936) between pixels that changed and all pixels.

        before, after: uint8 (B, 3, H, W), frames a moment apart. A pixel changed if any of its colours moved by more
        than `threshold` of their range.
        """
        before, after = before.float() / 255, after.float() / 255
        moved = (after - before).abs().amax(1).flatten() > threshold  # (B * H * W,)
        pixels = after.permute(0, 2, 3, 1).reshape(-1, 3).double()
        if not moved.any():
            raise ValueError("nothing moves in these frames, so there is nothing to learn to look at")
        covariance = torch.cov(pixels.T) + 1e-4 * torch.eye(3, dtype=torch.float64, device=pixels.device)
        direction = torch.linalg.solve(covariance, pixels[moved].mean(0) - pixels.mean(0))
        self.direction.copy_(direction / direction.norm())

    def centroid(self, pixels):
        """Mean position under the attention. pixels (B, 3, h, w) in 0..1 -> (B, 2): x in 0..w-1, y in 0..h-1."""
        b, _, h, w = pixels.shape
        scores = torch.einsum("bchw,c->bhw", pixels, self.sharpness * self.direction)
        attention = scores.flatten(1).softmax(1).view(b, h, w)
        x = attention.sum(1) @ torch.arange(w, dtype=torch.float32, device=pixels.device)
        y = attention.sum(2) @ torch.arange(h, dtype=torch.float32, device=pixels.device)
        return torch.stack([x, y], 1)

    @torch.no_grad()
    def forward(self, frames):
        """frames uint8 (B, 3, H, W) -> crops uint8 (B, 3, size, size), positions float32 (B, 2), x and y in -1..1."""
        b, _, height, width = frames.shape
        # Every stride-th pixel is enough to find the spot; within the cut-out the position is then measured finely.
        center = self.centroid(frames[:, :, :: self.stride, :: self.stride].float() / 255) * self.stride
        limit = torch.tensor([width - self.size, height - self.size], device=frames.device)
        corner = (center - self.size / 2).round().long().clamp(min=torch.zeros_like(limit), max=limit)  # (B, 2)
        span = torch.arange(self.size, device=frames.device)
        columns, rows = corner[:, :1] + span, corner[:, 1:] + span  # (B, size)
        index = rows[:, :, None] * width + columns[:, None, :]  # (B, size, size)
        crops = frames.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, 3, -1)).view(b, 3, *index.shape[1:])
        position = corner + self.centroid(crops.float() / 255)
        return crops, position / torch.tensor([(width - 1) / 2, (height - 1) / 2], device=frames.device) - 1


class CNN(nn.Module):
    """Three convolutions over the stacked glimpses, and where the glimpses were; one hidden layer for both heads."""

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)
        name: Literal["cnn"] = Field("cnn", description="which policy: a name in POLICIES")
        glimpse: int = Field(32, ge=16, le=100, description="side in pixels of the picture cut out around what moves")
        mirror: bool = Field(True, description="treat a lander on the left as one on the right seen in a mirror")
        features: int = Field(256, ge=1, description="units of each hidden layer")

    def __init__(self, options, planes, height, width, color, num_actions=4):
        super().__init__()
        self.stack, features = planes // 3, options.features
        self.mirror = options.mirror
        self.eye = Glimpse(options.glimpse)
        self.convs = nn.Sequential(
            orthogonal(nn.Conv2d(planes, 32, 4, stride=2)), nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 3, stride=2)), nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3)), nn.ReLU(), nn.Flatten())
        flat = self.convs(torch.zeros(1, planes, options.glimpse, options.glimpse)).shape[1]
        self.what = nn.Sequential(orthogonal(nn.Linear(flat, features)), nn.ReLU())
        self.hidden = nn.Sequential(orthogonal(nn.Linear(features + 2 * self.stack, features)), nn.Tanh())
        self.actor = orthogonal(nn.Linear(features, num_actions), 0.01)
        self.critic = orthogonal(nn.Linear(features, 1), 1.0)

    def calibrate(self, frames):
        frames = frames.unflatten(1, (self.stack, 3))  # (B, S, 3, H, W)
        self.eye.calibrate(frames[:, -2], frames[:, -1])

    def look(self, frames):
        """frames uint8 (B, 3 S, H, W) -> {"crops": uint8 (B, 3 S, size, size), "positions": float32 (B, S, 2)}."""
        crops, positions = self.eye(frames.unflatten(1, (self.stack, 3)).flatten(0, 1))
        crops = crops.view(len(frames), -1, *crops.shape[2:])
        positions = positions.view(-1, self.stack, 2)
        mirrored = positions[:, -1, 0] < 0
        if self.mirror:
            crops = torch.where(mirrored[:, None, None, None], crops.flip(3), crops)
            positions = torch.where(mirrored[:, None, None], positions * torch.tensor([-1.0, 1.0]), positions)
        return {"crops": crops, "positions": positions, "mirrored": mirrored}

    def forward(self, observation):
        what = self.what(self.convs(observation["crops"].float() / 255 - 0.25)).float()
        positions = observation["positions"]
        # Scaled to about unit deviation: a decision moves the lander by a hundredth of the picture.
        where = torch.cat([3 * positions[:, -1], 60 * positions.diff(dim=1).flatten(1)], 1)  # (B, 2 S)
        with torch.autocast(what.device.type, enabled=False):
            hidden = self.hidden(torch.cat([what, where], 1))
            logits = self.actor(hidden)
            if self.mirror:
                logits = torch.where(observation["mirrored"][:, None], logits[:, [0, 3, 2, 1]], logits)
            return logits, self.critic(hidden)[:, 0]


POLICIES = {"cnn": CNN}


def make_policy(options, planes, height, width, color):
    return POLICIES[options.name](options, planes, height, width, color)
