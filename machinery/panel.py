"""A policy's instruments while it lands, drawn beside the rendered frame: the panel of evaluate.py.

    insight = look_inside(policy, frames, action)     # frames uint8 (K, H, W), as one decision saw them
    panel = Panel(policy, config, "cnn, seed 1000000")
    panel.decide(frames, probabilities, value, action, episode_return=12.3, step=96, conditions="")
    picture = panel.picture(rendered)                 # uint8 (panel.height, panel.width, 3), one frame of the film

Nothing is smoothed or made up: every number is the policy's own output for the very frames that it is shown beside.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from machinery.drawing import Figure, FigureCanvasAgg, matplotlib
from models import Policy, Temporal
from task import VIEWPORT

FRAME_HEIGHT, FRAME_WIDTH = VIEWPORT  # pixels of the place of the rendered frame; others are scaled to fit
# Pixels. As wide as a README, and multiples of 16, which encoders like.
WIDTH, MARGIN, GAP, LINE = 912, 16, 10, 24
FRAME_TOP, STACK_TOP = 36, 468  # of the rendered frame, and of what the policy sees
CELL = 168  # largest picture of what the policy sees
ATTENTION_HEIGHT = 48
DPI = 100
PLACE_RADIUS = 4  # of the rings around places that attention looks at
SHOWN = 8  # newest frames of a longer stack
MOST_ACTIONS = 6  # that there is room for
BACKGROUND, GRID, FAINT, TEXT = "#1b1e24", "#3a3f48", "#a3a9b3", "#f2f3f5"
TAKEN, OTHER, RETURN, VALUE = "#4cc38a", "#7a808a", "#5ab0f6", "#f5a623"
BOX = (245, 166, 35)  # VALUE's red, green, blue


@dataclass
class Insight:
    """What one decision saw, and what it hung on."""

    pictures: np.ndarray  # uint8 (S, h, w, C): cut-outs, oldest first; whole frames of a policy without an eye
    corners: np.ndarray | None  # float32 (S, K, 2): column and row of each of K cut-outs in its frame
    saliency: np.ndarray  # float32 (h, w): |d output / d pixel| of the newest picture, over colours
    attention: np.ndarray | None  # float32 (heads, S): in the last layer over time, of the newest step to each frame
    places: np.ndarray | None  # float32 (PLACES, 2): x and y in -1..1 where model.pooling=attention looks in the newest


def look_inside(policy, frames, action):
    """The Insight into one decision. frames: uint8 tensor (K, H, W); action: the one that was chosen.

    Saliency is the plain gradient (Simonyan et al. 2014, arXiv:1312.6034, sec. 3) of the chosen action's logit, or of a
    continuous action's means: its absolute value, largest over the colours and summed over the means. With a frozen
    ResNet it is that of the frozen part's maps, since nothing before them is differentiated.
    """
    singles = frames.unflatten(0, (policy.spaces.frame_stack, policy.spaces.planes))  # (S, C, H, W)
    pictures = Policy.preprocess(policy, singles)["pictures"][:, 0].permute(0, 2, 3, 1)
    corners = policy.eye.find(singles)[1].cpu().numpy() if policy.eye else None
    frame_store, frame_ids = policy.preprocess_stacks(frames[None])
    pixels = frame_store["pictures"] = frame_store["pictures"].float().requires_grad_()  # bytes have no gradient
    with torch.enable_grad(), _attention_over_time(policy) as attention:
        distribution = policy(frame_store, frame_ids).distribution
        outputs = distribution.mean[0] if policy.spaces.continuous else distribution.logits[0, action][None]
        gradients = [torch.autograd.grad(output, pixels, retain_graph=True)[0] for output in outputs]
    # As seen, and in the mirror: with an eye it decides on one of them, without one on both.
    newest = sum((gradient[-1, 0] + gradient[-1, 1:].flip(3).sum(0)).abs() for gradient in gradients)
    weights = attention[-1] if attention else None
    if attention:  # which may leave out the oldest frame
        weights = np.pad(weights, ((0, 0), (policy.spaces.frame_stack - weights.shape[1], 0)))
    with torch.no_grad():
        places = policy.attended(frame_store, frame_ids)
    places = None if places is None else places[0].cpu().numpy()
    return Insight(pictures.cpu().numpy(), corners, newest.amax(0).cpu().numpy(), weights, places)


@contextmanager
def _attention_over_time(policy):
    """A list that gets, of each decision made meanwhile, the weights float32 (heads, S) of its newest step."""
    weights = []
    if not isinstance(policy, Temporal):
        yield weights
        return

    @torch.no_grad()
    def weigh(layer, inputs):
        steps = layer.norm1(inputs[0])  # what the layer, which normalises first, attends with
        weights.append(layer.self_attn(steps, steps, steps, average_attn_weights=False)[1][0, :, -1].cpu().numpy())

    hook = policy.over_time.layers[-1].register_forward_pre_hook(weigh)
    try:
        yield weights
    finally:
        hook.remove()


class Panel:
    """One episode's instruments. Only `decide` and `end` draw: in between nothing changes but the rendered frame."""

    width = WIDTH

    def __init__(self, policy, config, title):
        self.policy, self.frame_skip, self.reward_scale = policy, config.env.frame_skip, config.ppo.reward_scale
        self.task = config.env.task
        self.times, self.returns, self.values = [], [], []  # seconds; points so far; points still expected
        self.steps = min(policy.spaces.frame_stack, SHOWN)
        self.cell = min(CELL, (WIDTH - 2 * MARGIN - GAP * self.steps) // (self.steps + 1))
        self.columns = [MARGIN + i * (self.cell + GAP) for i in range(self.steps + 1)]
        self.frame_size = self.cell, self.cell * policy.spaces.height // policy.spaces.width
        self.picture_size = (self.cell // policy.options.glimpses, self.cell) if policy.eye else self.frame_size
        self.picture_top = STACK_TOP + (self.frame_size[1] + GAP if policy.eye else 0)
        attention_top = bottom = self.picture_top + self.picture_size[1]
        if isinstance(policy, Temporal):
            attention_top = bottom + LINE + 6
            bottom = attention_top + ATTENTION_HEIGHT
        self.height = -(-(bottom + GAP) // 16) * 16

        inches = (WIDTH + 0.1) / DPI, (self.height + 0.1) / DPI  # whole pixels, also if the product is cut off
        self.figure = Figure(inches, dpi=DPI, facecolor=BACKGROUND)
        self.canvas, self.moving = FigureCanvasAgg(self.figure), []  # what changes from decision to decision
        self._write(MARGIN, FRAME_TOP - 12, title, size=11)
        self.clock = self._write(MARGIN + FRAME_WIDTH, FRAME_TOP - 12, ha="right")
        right = 2 * MARGIN + FRAME_WIDTH
        self.weather = self._write(right, FRAME_TOP - 12, size=8.5)
        rows = min(len(self.task.actions), MOST_ACTIONS)
        self._make_bars(right, FRAME_TOP + LINE, rows)
        self._make_trace(right, FRAME_TOP + (rows + 1) * LINE + 72)
        for i, x in enumerate(self.columns[:-1]):
            ago = (self.steps - 1 - i) * self.frame_skip
            self._write(x, STACK_TOP - 8, f"seen {ago} steps ago" if ago else "seen now", color=FAINT)
        words = "saliency: how much\nthe action taken\nhangs on each pixel\nof the newest cut-out"
        self._write(self.columns[-1], self.picture_top - 8, words if policy.eye else "saliency", color=FAINT,
                    linespacing=1.5)
        self.attention = []
        if isinstance(policy, Temporal):
            self._make_attention(attention_top)
        self._draw_still()

    def decide(self, frames, numbers, value, action, episode_return, step, conditions=""):
        """Draw one decision. frames: uint8 array (K, H, W); value in the units of training; conditions: words.

        numbers (A,): the probability of each discrete action, or the mean of each number of a continuous one.
        """
        device = next(self.policy.parameters()).device
        insight = look_inside(self.policy, torch.from_numpy(frames).to(device), action)
        self.clock.set_text(f"step {step}, {step / self.task.fps:.2f} s")
        self.weather.set_text(conditions)
        for i, (bar, label) in enumerate(zip(self.bars, self.labels, strict=True)):
            if self.task.continuous:
                bar.set(width=min(max(numbers[i], -1), 1), color=TAKEN)
                label.set_text(f"{numbers[i]:.2f}")
            else:
                bar.set(width=numbers[i], color=TAKEN if i == action else OTHER)
                label.set_text(f"{numbers[i]:.0%}")
        self._extend_trace(step, episode_return, value / self.reward_scale)
        if self.attention:
            for bars, weights in zip(self.attention, insight.attention.T[-self.steps :], strict=True):
                for bar, weight in zip(bars, weights, strict=True):
                    bar.set_height(weight)
        self._draw_moving()
        self._draw_pictures(frames, insight)

    def end(self, episode_return, step, outcome):
        """Draw the episode's end: the return with its last reward, and how it ended."""
        self.clock.set_text(f"step {step}, {step / self.task.fps:.2f} s: {outcome}")
        self._extend_trace(step, episode_return, float("nan"))
        pictures = self.drawn[STACK_TOP:].copy()
        self._draw_moving()
        self.drawn[STACK_TOP:] = pictures

    def picture(self, frame):
        """The panel around a rendered frame, uint8 (H, W, 3) -> a new uint8 array (height, WIDTH, 3)."""
        scale = min(FRAME_HEIGHT / frame.shape[0], FRAME_WIDTH / frame.shape[1])
        if scale != 1:
            frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        height, width = frame.shape[:2]
        left, picture = MARGIN + (FRAME_WIDTH - width) // 2, self.drawn.copy()
        picture[FRAME_TOP : FRAME_TOP + height, left : left + width] = frame
        return picture

    def _axes(self, x, y, width, height):
        """Axes whose upper left corner is pixel (x, y)."""
        axes = self.figure.add_axes((x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height))
        axes.set(facecolor=BACKGROUND)
        axes.tick_params(labelsize=8.5, colors=FAINT, length=0)
        for side in axes.spines.values():
            side.set_color(GRID)
        return axes

    def _write(self, x, y, text=None, size=9.5, color=TEXT, **style):
        """Text whose baseline begins at pixel (x, y); without one yet, it will change with each decision."""
        written = self.figure.text(x / WIDTH, 1 - y / self.height, text or "", size=size, color=color, **style)
        if text is None:
            self.moving.append(written)
        return written

    def _make_bars(self, x, y, rows):
        low, title = (-1, "mean of each number") if self.task.continuous else (0, "probability of each action")
        self._write(x, y - 10, title, color=FAINT)
        axes = self._axes(x + 88, y, WIDTH - MARGIN - x - 88 - 40, rows * LINE)
        axes.set(xlim=(low, 1), ylim=(rows - 0.5, -0.5))
        axes.axis("off")
        axes.barh(range(rows), 1 - low, left=low, height=0.7, color=GRID, alpha=0.5)
        self.bars = axes.barh(range(rows), 0, height=0.7)
        side = 0.04 * (1 - low)
        for i, name in enumerate(self.task.actions[:rows]):
            axes.text(low - side, i, name, ha="right", va="center", size=9.5, color=TEXT)
        self.labels = [axes.text(1 + side, i, "", va="center", size=9.5, color=TEXT) for i in range(rows)]
        self.moving += [*self.bars, *self.labels]

    def _make_trace(self, x, y):
        self.now_return = self._write(x, y - LINE - 12, color=RETURN)
        self.now_value = self._write(x, y - 14, color=VALUE)
        self.trace = self._axes(x + 34, y, WIDTH - MARGIN - x - 34, FRAME_TOP + FRAME_HEIGHT - y - LINE - 6)
        self.trace.set(xlim=(0, 5), ylim=(-110, 310))
        self.trace.grid(color=GRID)
        self.trace.set_xlabel("seconds", size=8.5, color=FAINT, labelpad=0)
        self.curves = [self.trace.plot([], [], color=color, linewidth=1.6)[0] for color in (RETURN, VALUE)]
        self.moving += self.curves

    def _make_attention(self, y):
        self._write(
            MARGIN, y - 8, "attention over time: how much the newest step attends to each frame, one bar per head",
            color=FAINT)
        for x in self.columns[:-1]:
            axes = self._axes(x, y, self.cell, ATTENTION_HEIGHT)
            axes.set(ylim=(0, 1), xticks=[], yticks=[])
            self.attention.append(axes.bar(range(self.policy.options.heads), 0, color=TAKEN))
            self.moving += self.attention[-1]

    def _extend_trace(self, step, episode_return, value):
        self.times.append(step / self.task.fps)
        self.returns.append(episode_return)
        self.values.append(value)
        for curve, points in zip(self.curves, (self.returns, self.values), strict=True):
            curve.set_data(self.times, points)
        self.now_return.set_text(f"return so far: {episode_return:.0f}")
        known = not math.isnan(value)
        self.now_value.set_text(f"value: {value:.0f} still expected, discounted" if known else "")
        (low, high), seconds = self.trace.get_ylim(), self.trace.get_xlim()[1]
        points = [episode_return, value if known else episode_return]
        if min(points) <= low or max(points) >= high or self.times[-1] > seconds:  # seldom: all must be drawn anew
            while seconds < self.times[-1]:
                seconds *= 2
            low = min(points) - 100 if min(points) <= low else low
            high = max(points) + 100 if max(points) >= high else high
            self.trace.set(xlim=(0, seconds), ylim=(low, high))
            self._draw_still()

    def _draw_still(self):
        for artist in self.moving:
            artist.set_animated(True)  # left out by `draw`
        self.canvas.draw()
        self.still = self.canvas.copy_from_bbox(self.figure.bbox)

    def _draw_moving(self):
        self.canvas.restore_region(self.still)
        for artist in self.moving:
            self.figure.draw_artist(artist)
        self.drawn = np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def _draw_pictures(self, frames, insight):
        stack, planes = self.policy.spaces.frame_stack, self.policy.spaces.planes
        singles = frames.reshape(stack, planes, *frames.shape[1:]).transpose(0, 2, 3, 1)
        for i, x in enumerate(self.columns[:-1], stack - self.steps):
            place = self._paste(singles[i], x, STACK_TOP, self.frame_size)
            if self.policy.eye:
                scale = self.cell / frames.shape[2]
                side = int(self.policy.eye.size * scale)
                for corner in np.rint(insight.corners[i] * scale).astype(int):
                    cv2.rectangle(place, (*corner.tolist(), side, side), BOX)
                self._paste(insight.pictures[i], x, self.picture_top, self.picture_size)
        if insight.places is not None:  # in the newest cut-out, or in the whole frame
            newest = self.drawn[self.picture_top :, x:][: self.picture_size[1], : self.picture_size[0]]
            for column, row in np.rint((insight.places + 1) / 2 * (np.array(self.picture_size) - 1)).astype(int):
                cv2.circle(newest, (int(column), int(row)), PLACE_RADIUS, BOX)
        gray = insight.pictures[-1].mean(2, keepdims=True)
        strength = insight.saliency / max(insight.saliency.max(), 1e-12)
        if strength.shape != gray.shape[:2]:  # maps of a frozen ResNet are coarser
            strength = cv2.resize(strength, gray.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        heat = 255 * matplotlib.colormaps["inferno"](strength)[..., :3]
        blend = strength[..., None] ** 0.5  # so that weak gradients show too
        self._paste((gray * (1 - blend) + heat * blend).astype(np.uint8), self.columns[-1], self.picture_top,
                    self.picture_size)

    def _paste(self, pixels, x, y, size):
        """Enlarge uint8 (h, w, 3 or 1) to `size` (width, height) with its upper left corner at (x, y); that place."""
        enlarged = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_NEAREST)
        place = self.drawn[y : y + size[1], x : x + size[0]]
        place[:] = enlarged if enlarged.ndim == 3 else enlarged[..., None]
        return place
