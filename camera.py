"""A LunarLander drawn as the small frame that an agent sees: equal to what gymnasium renders, bit for bit."""

import os
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # we draw into memory; no display is needed

import cv2
import numpy as np
import pygame
from gymnasium.envs.box2d.lunar_lander import SCALE, VIEWPORT_H, VIEWPORT_W, LunarLander
from pygame import gfxdraw

from frames import frame_planes, shrink

FLAG_COLOR, POLE_COLOR = (204, 204, 0), (255, 255, 255)


class View(NamedTuple):
    """What a Camera draws of a lander, in pixels from the lower left corner of the picture."""

    outlines: list  # corners [x, y] of body and legs, each a list
    flames: list  # centres [x, y] of the particles
    body_box: list  # left, bottom, right, top of the outlines
    box: list  # of all that


@cache
def _shapes():
    """Body and legs, alike in all landers: corners in metres from the origin of their own body, float32 (V, 2); these
    turned by a quarter; how many corners each body has; and which these are, as slices.
    """
    lander = LunarLander()
    lander.reset(seed=0)
    shapes = [np.array(body.fixtures[0].shape.vertices, np.float32) for body in lander.drawlist]
    vertices, sizes = np.concatenate(shapes), [len(shape) for shape in shapes]
    across = vertices[:, ::-1] * np.array([-1, 1], np.float32)
    return vertices, across, sizes, [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))]


def views(landers):
    """The View of each of `landers`, LunarLanders.

    A corner is what `transform * vertex * SCALE` gives, in float32 and in Box2D's order of operations, but for all
    landers at once: to ask Box2D for one corner after the other takes longer than to draw them.
    """
    vertices, across, sizes, bodies = _shapes()
    poses, spots, starts = [], [], []  # flat: cos, sin, x, y of each body; x, y of each particle
    for lander in landers:
        for body in lander.drawlist:
            transform = body.transform
            turn, place = transform.q, transform.position
            poses += turn.c, turn.s, place.x, place.y
        starts.append(len(spots) // 2)
        spots += poses[-2:]  # no particle; a point of the lander, which may have none
        for particle in lander.particles:
            place = particle.position
            spots += place.x, place.y
    poses = np.array(poses, np.float32).reshape(len(landers), len(sizes), 4).repeat(sizes, 1)  # (landers, V, 4)
    corners = (poses[..., :1] * vertices + poses[..., 1:2] * across + poses[..., 2:]) * SCALE  # (landers, V, 2)
    spots = np.array(spots, np.float32).reshape(-1, 2) * SCALE
    low, high = corners.min(1), corners.max(1)
    body_boxes = np.concatenate([low, high], 1).tolist()
    low = np.minimum(low, np.minimum.reduceat(spots, starts))
    high = np.maximum(high, np.maximum.reduceat(spots, starts))
    boxes = np.concatenate([low, high], 1).tolist()
    outlines = [[own[body] for body in bodies] for own in corners.tolist()]
    spots = spots.tolist()
    flames = [spots[start + 1 : end] for start, end in pairwise([*starts, len(spots)])]
    return [*map(View, outlines, flames, body_boxes, boxes)]


class Camera:
    """Draws a LunarLander small, repainting only the rectangle where something moves.

    The drawing calls are those of gymnasium's `LunarLander.render`, in its order: terrain once per episode, then the
    smallest rectangle of whole small pixels around lander, legs and particles. The flags need care: the renderer
    redraws them after every object, and their blended edges grow more opaque each time, so they depend on how many
    objects there are. Where no object touches a flag, what it looks like after so many is known from earlier frames.
    """

    # One canvas for all cameras of a process; each copies its own background into the part that it repaints. Rows run
    # upwards, as in the renderer until it flips its picture at the end.
    pixels = np.zeros((VIEWPORT_H, VIEWPORT_W, 4), np.uint8)  # red, green, blue, unused
    canvas = pygame.image.frombuffer(pixels, (VIEWPORT_W, VIEWPORT_H), "RGBX")
    words = pixels.view(np.uint32)[..., 0]  # a pixel as one number
    radius = 2  # pixels; the renderer's particles are circles of 2 / SCALE metres
    margin = radius + 2  # pixels: a circle's radius, or an anti-aliased edge, and rounding

    def __init__(self, factor, color):
        self.factor, self.color = factor, color
        self.background = np.zeros((VIEWPORT_H, VIEWPORT_W), np.uint8)  # sky and terrain have no colour
        self.bare = np.zeros((frame_planes(color), VIEWPORT_H // factor, VIEWPORT_W // factor), np.uint8)
        self.behind_cloth = None  # full pixels of the strip in which the flags' cloth hangs, without it
        self.cloth = {}  # number of objects -> small pixels of that strip

    def start(self, lander):
        """Draw the terrain of a new episode."""
        # The renderer draws the sky in ten pieces; as one it gives the same pixels.
        sky = lander.sky_polys
        corners = [sky[0][0], *(piece[1] for piece in sky), sky[-1][2], sky[0][3]]
        corners = [(x * SCALE, y * SCALE) for x, y in corners]
        xs, self.flag_y = (lander.helipad_x1 * SCALE, lander.helipad_x2 * SCALE), lander.helipad_y * SCALE
        bottom = int(self.flag_y)
        highest = max(bottom + 53, *(int(y) + 2 for _, y in corners[:-2]))
        self.ground = min(-(-highest // self.factor) * self.factor, VIEWPORT_H)  # rows; above them is only sky, black
        self.canvas.set_clip((0, 0, VIEWPORT_W, self.ground))
        self.canvas.fill((255, 255, 255))
        pygame.draw.polygon(self.canvas, (0, 0, 0), corners)
        gfxdraw.aapolygon(self.canvas, corners, (0, 0, 0))
        for x in xs:  # a pole up to its cloth
            pygame.draw.line(self.canvas, POLE_COLOR, (x, self.flag_y), (x, self.flag_y + 38), 1)
        self.canvas.set_clip(None)
        ground = cv2.extractChannel(self.pixels[: self.ground], 0, dst=self.background[: self.ground])
        size = VIEWPORT_W // self.factor, self.ground // self.factor
        self.bare[:] = 0
        self.bare[:, -size[1] :] = cv2.resize(ground, size, interpolation=cv2.INTER_AREA)[::-1]
        self.flags = {x: self._whole_pixels(int(x) - 1, bottom - 1, int(x) + 28, bottom + 53) for x in xs}
        self.strip = self._whole_pixels(int(xs[0]) - 1, bottom + 37, int(xs[1]) + 28, bottom + 53)
        behind_cloth = self.background[self._full(self.strip)]
        if not np.array_equal(behind_cloth, self.behind_cloth):
            self.behind_cloth, self.cloth = behind_cloth.copy(), {}

    def frame(self, lander, view):
        """The small frame of this instant, a new uint8 (C, H, W) array; `view` is that of `views`."""
        outlines, flames, _, (left, bottom, right, top) = view
        m = self.margin
        small, draws = self.bare.copy(), len(flames) + len(outlines)
        small[self._small(self.strip)] = self.cloth[draws] if draws in self.cloth else self._draw_cloth(draws)
        dirty = self._whole_pixels(int(left) - m, int(bottom) - m, int(right) + m + 1, int(top) + m + 1)
        if not dirty:
            return small
        left, bottom, right, top = dirty
        ground = min(max(self.ground, bottom), top)
        self.words[ground:top, left:right] = 0
        if bottom < ground:
            full = self._full((left, bottom, right, ground))
            cv2.cvtColor(self.background[full], cv2.COLOR_GRAY2RGBA, dst=self.pixels[full])
        touched, apart = self._flags_near(dirty, view)
        for particle, center in zip(lander.particles, flames, strict=True):
            red = int(max(0.2, 0.15 + particle.ttl) * 255)
            other = int(max(0.2, 0.5 * particle.ttl) * 255)
            pygame.draw.circle(self.canvas, (red, other, other), center, self.radius)
            self._draw_flags(touched)
        for body, outline in zip(lander.drawlist, outlines, strict=True):
            pygame.draw.polygon(self.canvas, body.color1, outline)
            gfxdraw.aapolygon(self.canvas, outline, body.color1)
            pygame.draw.aalines(self.canvas, body.color2, True, outline)
            self._draw_flags(touched)
        kept = [(area, small[area].copy()) for area in map(self._small, apart)]
        small[self._small(dirty)] = self._shrink(self.pixels[self._full(dirty)])
        for area, pixels in kept:
            small[area] = pixels
        return small

    def _flags_near(self, dirty, view):
        """Of the flags in `dirty`: x of those that an object may touch, and rectangles of the others."""
        m, touched, apart = self.margin, [], []
        for x, rect in self.flags.items():
            if _overlap(rect, dirty):
                left, bottom, right, top = rect[0] - m, rect[1] - m, rect[2] + m, rect[3] + m
                if _overlap((left, bottom, right, top), view.body_box) or any(
                        left <= spot[0] <= right and bottom <= spot[1] <= top for spot in view.flames):
                    touched.append(x)
                else:
                    apart.append(rect)
        return touched, apart

    def _draw_cloth(self, draws):
        """Small pixels of the strip that holds the cloth of both flags, drawn `draws` times over."""
        full = self._full(self.strip)
        self.words[full] = 0
        for _ in range(draws):
            self._draw_flags(self.flags)
        # The cloth hangs in the black sky: wherever else there is something in the strip, the maximum is that.
        self.cloth[draws] = self._shrink(np.maximum(self.behind_cloth[..., None], self.pixels[full]))
        return self.cloth[draws]

    def _draw_flags(self, xs):
        bottom, top = self.flag_y, self.flag_y + 50
        for x in xs:
            pygame.draw.line(self.canvas, POLE_COLOR, (x, bottom), (x, top), 1)
            cloth = [(x, top), (x, top - 10), (x + 25, top - 5)]
            pygame.draw.polygon(self.canvas, FLAG_COLOR, cloth)
            gfxdraw.aapolygon(self.canvas, cloth, FLAG_COLOR)

    def _whole_pixels(self, left, bottom, right, top):
        """A rectangle grown to whole small pixels and cut to the picture; None if it lies outside."""
        f = self.factor
        left, bottom = max(left // f, 0) * f, max(bottom // f, 0) * f
        right, top = min(-(-right // f) * f, VIEWPORT_W), min(-(-top // f) * f, VIEWPORT_H)
        return (left, bottom, right, top) if left < right and bottom < top else None

    def _full(self, rect):
        """Where `rect` is in `pixels`."""
        left, bottom, right, top = rect
        return slice(bottom, top), slice(left, right)

    def _small(self, rect):
        """Where `rect` is in a small frame, whose rows run downwards."""
        left, bottom, right, top = rect
        f = self.factor
        return slice(None), slice((VIEWPORT_H - top) // f, (VIEWPORT_H - bottom) // f), slice(left // f, right // f)

    def _shrink(self, pixels):
        return shrink(pixels, self.factor, self.color)[:, ::-1]


def _overlap(one, other):
    """Whether two rectangles, each left, bottom, right, top, share a point."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
