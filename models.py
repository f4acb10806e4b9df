"""Policies: frames in, (action distribution, value) out.

    policy = make_policy(options, Spaces(4, 3, height=100, width=150, num_actions=4, mirrored_actions=(0, 3, 2, 1)))
    frame_store, frame_ids = policy.preprocess_stacks(frames)   # frames uint8 (B, frame_stack * planes, H, W)
    output = policy(frame_store, frame_ids)
    actions = output.distribution.sample()                      # int64 (B,); output.value is float32 (B,)

Each frame is preprocessed once, when it is collected: `preprocess` is the part of a policy that PPO's loss does not
train, what its eye makes of a frame. Its result, a dict of tensors with one row per frame, is the frame store that a
rollout keeps. `frame_ids`, int64 (B, S), says which rows of the store each decision sees, oldest first. With S = 4 and
one lander whose frames 0, 1, 2, ... are stored in order, the decision on frame 5 has the ids [2, 3, 4, 5] and the next
one [3, 4, 5, 6]. So a frame that neighbouring decisions share is stored once, and the policies below that encode frames
one by one encode it once. `forward` is what the update differentiates; where a policy looks is the affair of its eye,
in eyes.py.

To add a policy, subclass Policy, or Temporal, and name it in POLICIES at the end.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import nn
from torch.nn import functional as F

from eyes import EYES, PolicyError
from layers import (
    PLACE_WIDTH,
    PLACES,
    AttentionPool,
    PixelConv,
    autocast_dtype,
    channels_last,
    convolve_changes,
    mirror_image,
    orthogonal,
    swap_sides,
    take,
    transformer,
    view_ids,
)
from settings import Strict

LOG_STD = -0.5  # of continuous actions at the start: a deviation of 0.6, where actions lie between -1 and 1
EYE_STACKS, EYE_COEF = 2, 0.1  # a learned eye goes on learning: from so many stacks of each minibatch, so weighted
STAGES = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet


class WeightsError(PolicyError):
    """Pretrained weights that cannot be had."""


@dataclass(frozen=True)
class Spaces:
    """The facts of an environment that a policy depends on."""

    frame_stack: int  # frames that a decision sees
    planes: int  # of a frame: 3 in colour, 1 in gray
    height: int  # of a frame, pixels
    width: int
    num_actions: int  # discrete actions, or numbers of a continuous one
    mirrored_actions: tuple = ()  # what each action is in a mirror, or the signs of the numbers there; empty: unknown
    continuous: bool = False


class Categorical:
    """A distribution over discrete actions for each of B decisions, from logits float32 (B, A).

    The names are those of torch.distributions.Categorical. This one can also draw each decision from a generator of its
    own, so that an episode does not depend on those played beside it.
    """

    def __init__(self, logits):
        self.logits = logits
        self.log_probs = logits.log_softmax(-1)  # (B, A)

    @property
    def probs(self):
        """float64 (B, A), since NumPy checks that probabilities sum to 1"""
        return self.logits.cpu().double().softmax(-1)  # a Mac's GPU has no float64

    def sample(self, generators=None):
        """int64 (B,). With `generators`, NumPy's, decision b is drawn from generator b, else all from torch's."""
        if generators is None:
            return torch.multinomial(self.log_probs.exp(), 1)[:, 0]
        rows = self.probs.numpy()
        drawn = [rng.choice(len(row), p=row / row.sum()) for row, rng in zip(rows, generators, strict=True)]
        return torch.tensor(drawn, device=self.logits.device)

    def mode(self):
        """The likeliest action, int64 (B,)."""
        return self.logits.argmax(-1)

    def log_prob(self, actions):
        """log pi(action), float32 (B,), of actions int64 (B,)."""
        return self.log_probs.gather(1, actions[:, None])[:, 0]

    def entropy(self):
        """In nats, float32 (B,)."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1)


class DiagonalGaussian:
    """A normal distribution over A numbers, independent of each other, for each of B decisions.

    mean float32 (B, A), log_std float32 (A,). Named as torch.distributions.Normal, summed over the A numbers. Actions
    are what was sampled; the environment clips them where it must.
    """

    def __init__(self, mean, log_std):
        self.mean, self.log_std = mean, log_std

    def sample(self, generators=None):
        """float32 (B, A). With `generators`, NumPy's, decision b is drawn from generator b, else all from torch's."""
        if generators is None:
            noise = torch.randn_like(self.mean)
        else:
            drawn = np.stack([rng.standard_normal(self.mean.shape[1]) for rng in generators])
            noise = torch.from_numpy(drawn).to(self.mean)
        return self.mean + self.log_std.exp() * noise

    def mode(self):
        """The likeliest action, float32 (B, A)."""
        return self.mean

    def log_prob(self, actions):
        """The log of the density at actions, float32 (B, A) -> float32 (B,)."""
        z = (actions - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self):
        """In nats, float32 (B,); of a narrow distribution it is negative."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(self.mean))


@dataclass(frozen=True)
class PolicyOutput:
    """The output of a policy for B decisions."""

    distribution: Categorical | DiagonalGaussian  # of the action
    value: torch.Tensor  # float32 (B,), the expected discounted return in scaled rewards
    losses: dict = field(default_factory=dict)  # auxiliary losses by name, scalars, weighted; update adds and logs them


class Policy(nn.Module):
    """The base of all policies: the eye, the mirror, and the two heads on one hidden layer.

    A subclass calls `make_heads(F)`, and has `features(frame_store, frame_ids, mirrored)`: what decisions see in the
    rows frame_ids, int64 (B, S), of frame_store, in the mirror where `mirrored`, bool (B,), as float (B, F). What the
    eye says of them with model.tilt is added here. With `losses` it adds auxiliary losses.
    """

    class Options(Strict):
        name: str = Field(description="which policy: a name in POLICIES")
        eye: Literal["colour", "learned", "none"] = Field(
            "colour", description="finds what moves by its colour, or by a look that it learns; none: whole frames")
        eye_learning_rate: float = Field(0.004, gt=0, le=1, description="a learned eye's, times ppo.learning_rate")
        glimpse: int = Field(32, ge=16, description="side in pixels of the cut-out around what moves")
        glimpses: int = Field(1, ge=1, le=16, description="how many things that move the learned eye looks at")
        subpixel: bool = Field(True, description="cut out exactly around the spot, between pixels; false: whole pixels")
        tilt: bool = Field(
            False, description="the colour eye also says how what moves lies and if it is seen; its spot is finer")
        mirror: bool = Field(
            True, description="treat a lander on the left as one on the right seen in a mirror; without an eye, take "
            "the mean of what both views say")
        pooling: Literal["flatten", "attention"] = Field(
            "flatten", description="of the last map the policy takes all, or what is at some places that it looks for")
        features: int = Field(256, ge=1, le=10**10, description="units of the hidden layer before the two heads")

        @model_validator(mode="before")
        @classmethod
        def _without_an_eye(cls, options):
            """How runs from before there was more than one eye say that they have none."""
            if isinstance(options, dict) and str(options.get("glimpse")) == "0" and "eye" not in options:
                return {key: value for key, value in options.items() if key != "glimpse"} | {"eye": "none"}
            return options

    packages = ()  # that it needs besides PyTorch

    def __init__(self, options, spaces):
        super().__init__()
        if options.mirror and not spaces.mirrored_actions:
            raise PolicyError("model.mirror=true needs to know what each action is in a mirror")
        self.options, self.spaces = options, spaces
        has_eye = options.eye != "none"
        self.attends = options.pooling == "attention"
        self.takes_both_views = options.mirror and not has_eye  # nothing tells on which side things are
        # The maps of one view tell those of the other, where both strides of convolve_changes cut both views alike.
        self.mirrors_maps = self.takes_both_views and self.attends and spaces.width % 4 == 2
        if has_eye:
            more = {"mirror": options.mirror} if options.eye == "learned" else {"tilt": options.tilt}
            more |= {"glimpses": options.glimpses} if options.glimpses > 1 else {}
            self.eye = EYES[options.eye](spaces.planes, options.glimpse, options.subpixel, **more)
            self.picture_size = (options.glimpses * options.glimpse, options.glimpse)  # one below the other
        else:
            self.eye, self.picture_size = None, (spaces.height, spaces.width)
        self.num_measures = options.glimpses * (2 + 2 * options.tilt)  # numbers that the eye says of a frame

    def make_heads(self, inputs):
        features = self.options.features
        if self.options.tilt:  # what a tilt asks for depends on place and speed: a matter for a layer of its own
            measures = self.num_measures * self.spaces.frame_stack
            self.where = nn.Sequential(orthogonal(nn.Linear(measures, features)), nn.ReLU())
            inputs += features
        self.hidden = nn.Sequential(orthogonal(nn.Linear(inputs, features)), nn.Tanh())
        self.actor = orthogonal(nn.Linear(features, self.spaces.num_actions), 0.01)
        self.critic = orthogonal(nn.Linear(features, 1), 1.0)
        if self.spaces.continuous:
            self.log_std = nn.Parameter(torch.full((self.spaces.num_actions,), LOG_STD))

    def load_pretrained(self):
        """Read what training shall start from, once, before it starts; WeightsError if it cannot be had."""

    def calibrate(self, frames):
        """Learn what can be learned from frames alone. frames: uint8 (B, K, H, W), of any play."""
        if self.eye:
            self.eye.calibrate(frames)

    def parts_of_other_rate(self):
        """[(module, factor)]: what learns with another rate than ppo.learning_rate."""
        return [(self.eye, self.options.eye_learning_rate)] if self.options.eye == "learned" else []

    def parameter_groups(self):
        """Groups for the optimizer; lr_scale multiplies the learning rate."""
        groups = [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr_scale": factor}
            for module, factor in self.parts_of_other_rate()]
        inside = {id(p) for group in groups for p in group["params"]}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in inside]
        return [{"params": others, "lr_scale": 1.0}, *(group for group in groups if group["params"])]

    @torch.no_grad()
    def preprocess(self, frames):
        """Single frames, uint8 (B, planes, H, W) -> {"pictures": uint8 (B, V, planes, h, w), "positions": (B, M)}.

        V = 2: as seen, and with model.mirror as seen in the mirror; else 1. Positions are the M = num_measures numbers
        that the eye says. A learned eye needs the whole frames, too, to go on learning from.
        """
        if self.eye is None:
            pictures, positions = frames, torch.zeros(len(frames), self.num_measures, device=frames.device)
        else:
            pictures, positions = self.eye(frames)
        views = [pictures, pictures.flip(3)] if self.options.mirror else [pictures]
        frame_store = {"pictures": torch.stack(views, 1), "positions": positions}
        return frame_store | {"frames": frames} if self.options.eye == "learned" else frame_store

    def preprocess_stacks(self, stacks):
        """Stacks of frames, uint8 (B, K, H, W), each by itself -> (frame_store, frame_ids) for `forward`."""
        size = self.spaces.frame_stack
        frame_store = self.preprocess(stacks.unflatten(1, (size, self.spaces.planes)).flatten(0, 1))
        return frame_store, torch.arange(len(stacks) * size, device=stacks.device).view(-1, size)

    def forward(self, frame_store, frame_ids, minibatch=None):
        """The PolicyOutput of decisions that see the rows frame_ids, int64 (B, S), of frame_store.

        While learning, `minibatch` is the train.Rollout of these decisions, (B, ...).
        """
        if self.takes_both_views:
            inputs = self.both_views(frame_store, frame_ids)
            output = self.decide(inputs, torch.arange(len(inputs), device=frame_ids.device) >= len(frame_ids))
        else:
            mirrored = self.mirrored(frame_store, frame_ids)
            inputs = self.inputs(frame_store, frame_ids, mirrored)
            output = self.decide(inputs, mirrored)
        if minibatch is not None:
            own = inputs[: len(minibatch.frame_ids)]  # without those of the other view
            output.losses.update(self.losses(own, minibatch))
        return output

    def inputs(self, frame_store, frame_ids, mirrored):
        """What `decide` reads: the features, and with model.tilt what `where` makes of the eye's numbers."""
        features = self.features(frame_store, frame_ids, mirrored)
        if not self.options.tilt:
            return features
        return torch.cat([features, self.where(self.told(frame_store, frame_ids, mirrored))], 1)

    def losses(self, inputs, minibatch):
        """Auxiliary losses by name, weighted scalars. inputs: as `decide` reads; minibatch: train.Rollout, (B, ...)."""
        if self.options.eye != "learned":
            return {}
        some = minibatch.frame_ids[:: max(len(minibatch.frame_ids) // EYE_STACKS, 1)]
        stacks = minibatch.frame_store["frames"].index_select(0, some.flatten()).unflatten(0, some.shape)
        return {"eye": EYE_COEF * self.eye.loss(stacks)}

    def mirrored(self, frame_store, frame_ids):
        """bool (B,): whether this decision is seen in the mirror, because the newest glimpse is left of the middle.

        Of several glimpses, the first.
        """
        return (self.measures(frame_store, frame_ids)[:, -1, 0] < 0) & self.options.mirror

    def measures(self, frame_store, frame_ids):
        """What the eye says of the frames of each decision, float32 (B, S, num_measures).

        Where it knows that it sees nothing, as when a lander is above the picture, it says what it said of the last
        frame before, or else of the next, in which it saw something; or 0.
        """
        positions = frame_store["positions"]
        if not self.options.tilt:
            return positions[frame_ids]
        seen = positions[frame_ids, -1] > 0  # (B, S)
        steps = torch.arange(seen.shape[1], device=seen.device)
        last = torch.where(seen, steps, -1).cummax(1).values
        shown = torch.where(last < 0, seen.int().argmax(1, keepdim=True), last)
        said = positions[frame_ids.gather(1, shown)]
        return torch.cat([said[..., :-1] * said[..., -1:], seen[..., None].float()], 2)

    def both_views(self, frame_store, frame_ids):
        """The features of B decisions, then those of what a mirror would show: float (2 * B, F)."""
        mirrored = torch.arange(2 * len(frame_ids), device=frame_ids.device) >= len(frame_ids)
        return self.features(frame_store, frame_ids.repeat(2, 1), mirrored)

    def attended(self, frame_store, frame_ids):
        """Where model.pooling=attention looks in the newest picture, x and y in -1..1: (B, PLACES, 2); or None."""
        mirrored = self.mirrored(frame_store, frame_ids)
        places = self.newest_places(frame_store, frame_ids, mirrored) if self.attends else None
        return None if places is None else swap_sides(places.unflatten(1, (PLACES, 2)), mirrored)

    def newest_places(self, frame_store, frame_ids, mirrored):
        """As `attended`, in the picture that `features` sees: (B, 2 * PLACES); None of a policy that never looks so."""

    def scaled_measures(self, frame_store, frame_ids, mirrored):
        """(scaled, changes), both float32 (B, S, num_measures): what the eye says, and its change since the last frame.

        Scaled to about unit deviation: one decision moves the lander by a hundredth of the picture.
        """
        measures = self.measures(frame_store, frame_ids).unflatten(2, (self.options.glimpses, -1))
        spots, tilts, seen = measures.tensor_split((2, 3), dim=3)  # the latter two are empty without model.tilt
        spots, tilts = swap_sides(spots, mirrored), torch.where(mirrored[:, None, None, None], -tilts, tilts)
        turns = (tilts.diff(dim=1) + math.pi / 2).remainder(math.pi) - math.pi / 2  # an axis has no front
        turns = turns.clamp(-0.2, 0.2)  # more is a mistake of the eye
        scaled = torch.cat([3 * spots, 2 * tilts, seen], 3)
        changes = F.pad(torch.cat([60 * spots.diff(dim=1), 10 * turns, seen.diff(dim=1)], 3), (0, 0, 0, 0, 1, 0))
        return scaled.flatten(2), changes.flatten(2)

    def told(self, frame_store, frame_ids, mirrored):
        """What the eye says of the newest frame, and all changes: float32 (B, S * num_measures)."""
        scaled, changes = self.scaled_measures(frame_store, frame_ids, mirrored)
        return torch.cat([scaled[:, -1], changes[:, 1:].flatten(1)], 1)

    def decide(self, inputs, mirrored):
        """inputs (B, I) -> PolicyOutput; in float32, since probabilities are exponentials.

        Without an eye, the second half of the inputs are the first half's decisions in the mirror. The output is the
        mean of both.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            hidden = self.hidden(inputs.float())
            actor, value = self.actor(hidden), self.critic(hidden)[:, 0]
            if self.options.mirror:
                other = list(self.spaces.mirrored_actions)
                other = actor * torch.tensor(other, device=actor.device) if self.spaces.continuous else actor[:, other]
                actor = torch.where(mirrored[:, None], other, actor)
            if self.takes_both_views:
                actor, value = actor.unflatten(0, (2, -1)).mean(0), value.unflatten(0, (2, -1)).mean(0)
            if self.spaces.continuous:
                return PolicyOutput(DiagonalGaussian(actor, self.log_std), value)
            return PolicyOutput(Categorical(actor), value)


class CNN(Policy):
    """Three convolutions over the stacked pictures, and where they were cut out; one hidden layer for both heads."""

    class Options(Policy.Options):
        name: Literal["cnn"] = Field("cnn", description="which policy: a name in POLICIES")
        channels: int = Field(32, ge=1, le=1024, description="of the first convolution; the others have twice as many")

    def __init__(self, options, spaces):
        super().__init__(options, spaces)
        planes, channels = spaces.frame_stack * spaces.planes, options.channels
        if self.attends:
            self.convs = convolve_changes(spaces.frame_stack, spaces.planes, mirror=self.mirrors_maps)
            self.pool = AttentionPool(64)
            flat = self.pool.outputs
        else:
            self.convs = nn.Sequential(
                orthogonal(PixelConv(planes, channels, 4, stride=2)), nn.ReLU(),
                orthogonal(nn.Conv2d(channels, 2 * channels, 3, stride=2)), nn.ReLU(),
                orthogonal(nn.Conv2d(2 * channels, 2 * channels, 3)), nn.ReLU(), nn.Flatten())
            flat = self.convs(torch.zeros(1, planes, *self.picture_size)).shape[1]
        self.what = nn.Sequential(orthogonal(nn.Linear(flat, options.features)), nn.ReLU())
        measures = 0 if options.tilt else self.num_measures * spaces.frame_stack  # with a tilt, `where` reads them
        self.make_heads(options.features + measures)

    def maps(self, frame_store, frame_ids, mirrored=None):
        """What the convolutions make of the stacked pictures, in the mirror where `mirrored`: float (B, ...)."""
        views = view_ids(frame_ids, mirrored).flatten()
        pictures = take(frame_store["pictures"], views)  # (B * S, planes, h, w)
        pictures = pictures.view(len(frame_ids), -1, *self.picture_size)  # (B, S * planes, h, w)
        return self.convs(channels_last(pictures, autocast_dtype(pictures.device)))

    def features(self, frame_store, frame_ids, mirrored):
        seen = self.maps(frame_store, frame_ids, mirrored)
        what = self.what(self.pool(seen) if self.attends else seen).float()
        return what if self.options.tilt else torch.cat([what, self.told(frame_store, frame_ids, mirrored)], 1)

    def newest_places(self, frame_store, frame_ids, mirrored):
        return self.pool(self.maps(frame_store, frame_ids, mirrored))[:, -2 * PLACES :]

    def both_views(self, frame_store, frame_ids):
        """With model.pooling=attention the convolutions see one view, if that of the other follows from it."""
        if not self.mirrors_maps:
            return super().both_views(frame_store, frame_ids)
        maps = self.maps(frame_store, frame_ids)
        what = self.what(self.pool(torch.cat([maps, mirror_image(maps)]))).float()
        return F.pad(what, (0, self.num_measures * self.spaces.frame_stack))  # no places of glimpses


class Temporal(Policy):
    """An encoder for each frame's picture, a Transformer encoder over the frames, heads that read the newest step.

    Subclasses make `self.encoder`: float (B, 3, h, w), pixels in 0..1 -> (B, width), or with model.pooling=attention
    (B, width + 2 * PLACES), of which the last are the places. It sees every picture once: while collecting, embeddings
    are remembered beside the frames; in the update, frames shared by the stacks of a minibatch are encoded once for
    all of them.
    """

    class Options(Policy.Options):
        width: int = Field(128, ge=1, le=65_536, description="size of a step's embedding; a multiple of heads")
        layers: int = Field(2, ge=1, le=1000, description="Transformer layers over time")
        heads: int = Field(4, ge=1, validate_default=True, description="attention heads")

        @field_validator("heads")
        @classmethod
        def _divides(cls, value, info):
            width = info.data.get("width", value)
            if width % value:
                raise ValueError(f"must divide width={width}")
            return value

    def __init__(self, options, spaces):
        super().__init__(options, spaces)
        self.num_places = PLACES if self.attends else 0
        self.place = nn.Linear(2 * self.num_measures + 4 * self.num_places, options.width)
        self.time = nn.Parameter(0.02 * torch.randn(spaces.frame_stack, options.width))  # learned time positions
        self.over_time = transformer(options.width, options.heads, options.layers)
        self.make_heads(options.width)

    def preprocess(self, frames):
        """As Policy.preprocess, and empty places for embeddings: one as seen, one as seen in the mirror."""
        size = self.options.width + 2 * self.num_places
        blank = torch.zeros(len(frames), 2, size, device=frames.device)
        return super().preprocess(frames) | {"embeddings": blank, "embedded": blank[..., 0] > 0}

    def pictures(self, frame_store, views):
        """What the encoder reads. views int64 (B,), as of view_ids -> float (B, 3, h, w) in 0..1."""
        pictures = take(frame_store["pictures"], views)
        return channels_last(pictures.expand(-1, 3, -1, -1)).div_(255)  # gray becomes three equal planes

    def encode(self, frame_store, views):
        """views int64 (V,), each but once -> what the encoder says of each, (V, ...)."""
        return self.encoder(self.pictures(frame_store, views))

    def embed(self, frame_store, views):
        """views int64 (B, S) -> what the encoder says of each (B, S, ...)."""
        if self.training:
            unique, where = views.unique(return_inverse=True)
            return self.encode(frame_store, unique)[where]
        embeddings = frame_store["embeddings"].flatten(0, 1)  # a view, like the next: what is written stays
        embedded = frame_store["embedded"].flatten()
        new = views[~embedded[views]].unique()
        if len(new):
            embeddings[new] = self.encode(frame_store, new).float()
            embedded[new] = True
        return embeddings[views]

    def features(self, frame_store, frame_ids, mirrored):
        embeddings = self.embed(frame_store, view_ids(frame_ids, mirrored))
        steps, where = embeddings.split([self.options.width, 2 * self.num_places], dim=-1)
        told = torch.cat(self.scaled_measures(frame_store, frame_ids, mirrored), -1)
        if self.attends:  # attention may jump from one thing to another
            changes = (30 * F.pad(where.diff(dim=1), (0, 0, 1, 0))).clamp(-2, 2)
            told = torch.cat([told, 2 * where, changes], -1)
        steps = steps + self.place(told) + self.time[-frame_ids.shape[1] :]  # (B, S, width)
        return self.over_time(steps)[:, -1]

    def newest_places(self, frame_store, frame_ids, mirrored):
        return self.embed(frame_store, view_ids(frame_ids, mirrored))[:, -1, -2 * PLACES :]

    def attend(self, maps):
        """With model.pooling=attention the encoder's last step: (V, C, h, w) -> (V, width + 2 * PLACES)."""
        seen = self.pool(maps)
        return torch.cat([self.project(seen).float(), seen[:, -2 * PLACES :]], 1)


class TemporalResNet(Temporal):
    """A ResNet (He et al. 2016, arXiv:1512.03385) per frame, cut after one of its stages, and attention over time.

    The last stage's map is flattened, not averaged: a lander's tilt is a matter of where things are. Batch
    normalisation always uses fixed statistics, those of the pretrained weights or, without, of the first frames of
    random play, so that collecting and updating see the same function.
    """

    packages = ("torchvision",)

    class Options(Temporal.Options):
        name: Literal["temporal_resnet"] = Field("temporal_resnet", description="which policy: a name in POLICIES")
        resnet: str = Field("resnet18", description="any of torchvision's ResNets by name")
        weights: str = Field("none", description="a name of torchvision's (IMAGENET1K_V1), a file, or none")
        depth: Literal[STAGES] = Field("layer1", description="the last stage that is used")
        frozen: Literal[("none", "stem", *STAGES)] = Field("none", description="the last part that never learns")
        enlarge: int = Field(1, ge=1, le=8, description="pictures are enlarged by this before the ResNet")
        encoder_learning_rate: float = Field(1.0, gt=0, le=10, description="the ResNet's, times ppo.learning_rate")

        @field_validator("resnet")
        @classmethod
        def _exists(cls, value):
            from torchvision import models

            names = models.list_models(module=models, include=["resnet*", "resnext*", "wide_resnet*"])
            if value not in names:
                raise ValueError(f"must be one of {', '.join(names)}")
            return value

        @field_validator("frozen")
        @classmethod
        def _not_beyond_depth(cls, value, info):
            depth = info.data.get("depth", STAGES[-1])
            if value in STAGES and value > depth:
                raise ValueError(f"must not lie beyond depth={depth}")
            return value

    def __init__(self, options, spaces):
        super().__init__(options, spaces)
        from torchvision.models import get_model

        whole = get_model(options.resnet, weights=None, zero_init_residual=True)
        parts = {"stem": nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.maxpool)}
        parts |= {stage: getattr(whole, stage) for stage in STAGES[: STAGES.index(options.depth) + 1]}
        self.resnet = nn.ModuleDict(parts)
        learned_from = 0 if options.frozen == "none" else list(parts).index(options.frozen) + 1
        self.frozen, self.learning = list(parts)[:learned_from], list(parts)[learned_from:]
        for name in self.frozen:
            self.resnet[name].requires_grad_(False)
        # Normalisation of torchvision's ImageNet weights; without weights it does no harm.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.eval()
        with torch.no_grad():
            maps = self.run(parts, self.prepare(torch.zeros(1, 3, *self.picture_size)))
        if self.attends:
            self.pool = AttentionPool(maps.shape[1])
        self.project = nn.Linear(self.pool.outputs if self.attends else maps[0].numel(), options.width)

    def train(self, mode=True):
        super().train(mode)
        self.resnet.eval()
        return self

    def prepare(self, pictures):
        if self.options.enlarge > 1:
            pictures = F.interpolate(pictures, scale_factor=self.options.enlarge, mode="bilinear")
        return (pictures - self.mean) / self.std

    def run(self, names, maps):
        for name in names:
            maps = self.resnet[name](maps)
        return maps

    def encoder(self, maps):
        maps = self.run(self.learning, maps)
        return self.attend(maps) if self.attends else self.project(maps.flatten(1))

    def load_pretrained(self):
        options = self.options
        if options.weights == "none":
            return
        from torchvision.models import get_model_weights

        if Path(options.weights).is_file():
            source = options.weights
            try:
                state = torch.load(source, map_location="cpu", weights_only=True)
            except Exception as error:
                raise WeightsError(f"model.weights={source}: {str(error).splitlines()[0]}") from None
        else:
            known = get_model_weights(options.resnet)
            if options.weights not in known.__members__:
                raise WeightsError(
                    f"model.weights={options.weights}: neither a file nor one of none, {', '.join(known.__members__)}")
            source = known[options.weights].url
            try:
                state = known[options.weights].get_state_dict(progress=False, check_hash=True)
            except Exception as error:  # torch raises what it likes for a broken download
                reason = str(error).partition("\n")[0]
                raise WeightsError(
                    f"model.weights={options.weights}: {source} cannot be had ({reason}); download it elsewhere and "
                    "give the file as model.weights=FILE, or train without: model.weights=none") from None
        wanted = {"conv1": "stem.0", "bn1": "stem.1"}  # torchvision's names -> ours
        renamed = {}
        for key, tensor in state.items() if isinstance(state, dict) else ():
            first, _, rest = key.partition(".")
            renamed[f"{wanted.get(first, first)}.{rest}"] = tensor
        ours = self.resnet.state_dict()
        unfit = [key for key, tensor in ours.items() if key not in renamed or renamed[key].shape != tensor.shape]
        if unfit:
            raise WeightsError(
                f"model.weights={source}: not weights of {options.resnet} ({unfit[0]} is missing or differs)")
        self.resnet.load_state_dict({key: renamed[key] for key in ours})

    def calibrate(self, frames):
        super().calibrate(frames)
        if self.options.weights == "none":
            self._measure_norms(frames)

    @torch.no_grad()
    def _measure_norms(self, frames):
        """The statistics of what the batch normalisations see: from these frames, and once."""
        norms = [module for module in self.resnet.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
            norm.train()
        frame_store = Policy.preprocess(self, frames[:, -self.spaces.planes :])
        pictures = super().pictures(frame_store, 2 * torch.arange(len(frames), device=frames.device))
        for part in self.prepare(pictures).split(256):
            self.run(self.resnet, part)
        self.resnet.eval()

    def preprocess(self, frames):
        """With a frozen part, its maps of the picture and of its mirror image stand in the picture's place."""
        frame_store = super().preprocess(frames)
        if self.frozen:
            pictures = frame_store["pictures"]
            views = torch.arange(0, 2 * len(frames), 2 // pictures.shape[1], device=frames.device)
            maps = self.run(self.frozen, self.prepare(super().pictures(frame_store, views)))
            frame_store["pictures"] = maps.unflatten(0, pictures.shape[:2])  # (B, V, c, h, w)
        return frame_store

    def pictures(self, frame_store, views):
        if self.frozen:
            return take(frame_store["pictures"], views)
        return self.prepare(super().pictures(frame_store, views))

    def parts_of_other_rate(self):
        return [*super().parts_of_other_rate(), (self.resnet, self.options.encoder_learning_rate)]


class Transformer(Temporal):
    """Attention over space, among the patches of each picture, then over time, among the frames: factored attention.

    (Arnab et al. 2021, "ViViT", arXiv:2103.15691, model 2.) A light convolutional stem makes the patches. With
    model.pooling=attention a few places that attention finds stand for the patches (Ryoo et al. 2021, "TokenLearner",
    arXiv:2106.11297), in a picture and its changes since the one before.
    """

    class Options(Temporal.Options):
        name: Literal["transformer"] = Field("transformer", description="which policy: a name in POLICIES")
        patch: Literal[4, 8, 16] = Field(8, description="side in pixels of the square that makes one token")
        spatial_layers: int = Field(2, ge=1, le=1000, description="Transformer layers over a picture's patches")
        spatial_width: int = Field(
            64, ge=2, le=65_536, validate_default=True, description="size of a patch's token; a multiple of heads")

        @field_validator("spatial_width")
        @classmethod
        def _divisible(cls, value, info):
            if value % info.data.get("heads", value):
                raise ValueError(f"must be a multiple of heads={info.data['heads']}")
            return value

    def __init__(self, options, spaces):
        super().__init__(options, spaces)
        size = options.spatial_width
        if self.attends:
            tokens = PLACES
            self.stem = convolve_changes(2, 3, mirror=self.mirrors_maps)
            self.pool = AttentionPool(64)
            self.token = nn.Linear(PLACE_WIDTH + 2, size)
        else:
            tokens = (-(-self.picture_size[0] // options.patch)) * (-(-self.picture_size[1] // options.patch))
            channels, layers = 3, []
            for _ in range(options.patch.bit_length() - 2):  # halve until patches are 2 x 2
                layers += [nn.Conv2d(channels, size // 2, 4, stride=2, padding=1), nn.GELU()]
                channels = size // 2
            self.stem = nn.Sequential(*layers, nn.Conv2d(channels, size, 2, stride=2))
        self.space = nn.Parameter(0.02 * torch.randn(tokens, size))  # learned places of the patches
        self.over_space = transformer(size, options.heads, options.spatial_layers)
        self.project = nn.Linear(tokens * size, options.width)  # flattened, so that places stay apart

    def encoder(self, pictures):
        height, width = self.picture_size
        patch = self.options.patch
        pictures = F.pad(pictures - 0.25, (0, -width % patch, 0, -height % patch))
        tokens = self.stem(pictures).flatten(2).transpose(1, 2) + self.space  # (V, tokens, spatial_width)
        return self.project(self.over_space(tokens).flatten(1))

    def attend(self, maps):
        what, where = self.pool(maps).split([PLACES * PLACE_WIDTH, 2 * PLACES], 1)
        tokens = self.token(torch.cat([what.unflatten(1, (PLACES, -1)), where.unflatten(1, (PLACES, -1))], 2))
        return torch.cat([self.project(self.over_space(tokens + self.space).flatten(1)).float(), where], 1)

    def encode(self, frame_store, views):
        if not self.attends:
            return super().encode(frame_store, views)
        if not self.mirrors_maps:
            return self.attend(self.stem(self.changes(frame_store, views)))
        rows, which = (views // 2).unique(return_inverse=True)  # the maps of the other view follow from those of one
        maps = self.stem(self.changes(frame_store, 2 * rows))
        return self.attend(torch.cat([maps, mirror_image(maps)]))[which + len(rows) * (views % 2)]

    def changes(self, frame_store, views):
        """Each picture after the one before it, as pixels 0 to 255: views int64 (V,) -> float (V, 6, h, w)."""
        rows = torch.stack([frame_store["before"][views // 2], views // 2], 1)
        pictures = take(frame_store["pictures"], view_ids(rows, views % 2).flatten()).expand(-1, 3, -1, -1)
        return channels_last(pictures.unflatten(0, (-1, 2)).flatten(1, 2), autocast_dtype(pictures.device))

    def preprocess(self, frames):
        """With model.pooling=attention, and a note for each frame: in which row the frame before it is."""
        frame_store = super().preprocess(frames)
        before = torch.zeros(len(frames), dtype=torch.int64, device=frames.device)
        return frame_store | {"before": before} if self.attends else frame_store

    def features(self, frame_store, frame_ids, mirrored):
        if self.attends:  # of the oldest frame nobody knows what was before; it is seen in the changes to the next
            frame_store["before"][frame_ids[:, 1:]] = frame_ids[:, :-1]
            frame_ids = frame_ids[:, 1:]
        return super().features(frame_store, frame_ids, mirrored)


POLICIES = {"cnn": CNN, "temporal_resnet": TemporalResNet, "transformer": Transformer}


def make_policy(options, spaces):
    """The untrained policy of `options` for what `spaces` says it sees and does."""
    return POLICIES[options.name](options, spaces)
