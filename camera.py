"""A LunarLander drawn as the small frame that an agent sees: equal to what gymnasium renders, bit for bit."""

import os
from itertools import islice

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # we draw into memory; no display is needed

import cv2
import numpy as np
import pygame
from gymnasium.envs.box2d.lunar_lander import SCALE, VIEWPORT_H, VIEWPORT_W
from pygame import gfxdraw

FLAG_COLOR, POLE_COLOR = (204, 204, 0), (255, 255, 255)


def frame_planes(color):
    """Planes per frame: 3 (red, green, blue) in colour, 1 in gray."""
    return 3 if color else 1


def shrink(frame, factor, color):
    """A rendered frame, uint8 (H, W, 3 or 4) RGB or RGBX, as the agent's small frame, uint8 (C, H/factor, W/factor).

    Gray first where asked for (ITU-R BT.601 weights, as OpenCV rounds them), then the mean over
    factor x factor blocks, which is what INTER_AREA means for a whole factor.
    """
    height, width = frame.shape[0] // factor, frame.shape[1] // factor
    if not color:
        frame = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    return small.transpose(2, 0, 1)[:3] if color else small[None]


def outlines(landers):
    """Corners of body and legs of LunarLanders, in pixels: per lander and body a list of (x, y).

    What `transform * vertex * SCALE` gives, in float32 and in Box2D's order of operations, but for all landers at once:
    to ask Box2D for one corner after the other takes longer than to draw them.
    """
    shapes = [body.fixtures[0].shape.vertices for body in landers[0].drawlist]  # all landers are alike
    vertex_x, vertex_y = np.concatenate(shapes).astype(np.float32).T
    poses = []
    for lander in landers:
        for body in lander.drawlist:
            transform = body.transform
            turn = transform.q
            poses.append((turn.c, turn.s, *transform.position.tuple))
    owners = [i for i, shape in enumerate(shapes) for _ in shape]
    poses = np.array(poses, np.float32).reshape(len(landers), len(shapes), 4)[:, owners]
    cos, sin, x, y = poses.transpose(2, 0, 1)  # (landers, vertices)
    xs = (cos * vertex_x - sin * vertex_y + x) * SCALE
    ys = (sin * vertex_x + cos * vertex_y + y) * SCALE
    corners = (zip(*row, strict=True) for row in zip(xs.tolist(), ys.tolist(), strict=True))
    return [[list(islice(row, len(shape))) for shape in shapes] for row in corners]


class Camera:
    """Draws a LunarLander small, repainting only the rectangle where something moves.

    The drawing calls are those of gymnasium's `LunarLander.render`, in its order: terrain once per episode, then the
    smallest rectangle of whole small pixels around lander, legs and particles. The flags need care: the renderer
    redraws them after every object, and their blended edges grow more opaque each time, so they depend on how many
    objects there are.
    """

    # One canvas for all cameras of a process; each copies its own background into the part that it repaints. Rows run
    # upwards, as in the renderer until it flips its picture at the end.
    pixels = np.zeros((VIEWPORT_H, VIEWPORT_W, 4), np.uint8)  # red, green, blue, unused
    canvas = pygame.image.frombuffer(pixels, (VIEWPORT_W, VIEWPORT_H), "RGBX")

    def __init__(self, factor, color):
        self.factor, self.color = factor, color
        self.background = np.zeros((VIEWPORT_H, VIEWPORT_W), np.uint8)  # sky and terrain have no colour
        self.bare = np.zeros((frame_planes(color), VIEWPORT_H // factor, VIEWPORT_W // factor), np.uint8)
        self.full_cloth = {}  # number of objects -> full pixels of the flags' cloth

    def start(self, lander):
        """Draw the terrain of a new episode."""
        half = VIEWPORT_H // 2  # terrain never rises above it; the sky there stays black
        self.canvas.set_clip((0, 0, VIEWPORT_W, half))
        self.canvas.fill((255, 255, 255))
        # The renderer draws the sky in ten pieces; as one it gives the same pixels.
        sky = lander.sky_polys
        corners = [sky[0][0], *(piece[1] for piece in sky), sky[-1][2], sky[0][3]]
        corners = [(x * SCALE, y * SCALE) for x, y in corners]
        pygame.draw.polygon(self.canvas, (0, 0, 0), corners)
        gfxdraw.aapolygon(self.canvas, corners, (0, 0, 0))
        self.flag_x = [lander.helipad_x1 * SCALE, lander.helipad_x2 * SCALE]
        self.flag_y = lander.helipad_y * SCALE
        for x in self.flag_x:  # a pole up to its cloth
            pygame.draw.line(self.canvas, POLE_COLOR, (x, self.flag_y), (x, self.flag_y + 38), 1)
        self.canvas.set_clip(None)
        self.background[:half] = self.pixels[:half, :, 0]
        size = VIEWPORT_W // self.factor, half // self.factor
        small = cv2.resize(self.background[:half], size, interpolation=cv2.INTER_AREA)
        self.bare[:, half // self.factor :] = small[::-1]
        rects = [pygame.Rect(int(x) - 1, int(self.flag_y) - 1, 29, 54) for x in self.flag_x]
        self.flag_rects = [self._whole_pixels(rect) for rect in rects]
        left, right = rects
        self.cloth = self._whole_pixels(pygame.Rect(left.left, left.top + 38, right.right - left.left, 16))
        self.small_cloth = {}  # number of objects -> small pixels of `cloth`

    def frame(self, lander, outlines):
        """The small frame of this instant, a new uint8 (C, H, W) array; `outlines` are those of lander.drawlist."""
        radius = 2  # pixels; the renderer's particles are circles of 2 / SCALE metres
        centers = [(particle.position * SCALE).tuple for particle in lander.particles]

        xs, ys = zip(*sum(outlines, centers), strict=True)
        margin = radius + 2  # pixels: a circle's radius, or an anti-aliased edge, and rounding
        left, bottom = int(min(xs)) - margin, int(min(ys)) - margin
        dirty = pygame.Rect(left, bottom, int(max(xs)) + margin + 1 - left, int(max(ys)) + margin + 1 - bottom)
        dirty = self._whole_pixels(dirty)

        small = self.bare.copy()
        small[self._small(self.cloth)] = self._cloth(len(centers) + len(outlines))
        if not dirty:
            return small
        part = self.pixels[self._full(dirty)]
        cv2.cvtColor(self.background[self._full(dirty)], cv2.COLOR_GRAY2RGBA, dst=part)
        flags = dirty.collidelist(self.flag_rects) >= 0
        for particle, center in zip(lander.particles, centers, strict=True):
            red = int(max(0.2, 0.15 + particle.ttl) * 255)
            other = int(max(0.2, 0.5 * particle.ttl) * 255)
            pygame.draw.circle(self.canvas, (red, other, other), center, radius)
            if flags:
                self._draw_flags()
        for body, outline in zip(lander.drawlist, outlines, strict=True):
            pygame.draw.polygon(self.canvas, body.color1, outline)
            gfxdraw.aapolygon(self.canvas, outline, body.color1)
            pygame.draw.aalines(self.canvas, body.color2, True, outline)
            if flags:
                self._draw_flags()
        small[self._small(dirty)] = self._shrink(part)
        return small

    def _cloth(self, draws):
        """Small pixels of the strip that holds the cloth of both flags, drawn `draws` times over."""
        area = self._full(self.cloth)
        if draws not in self.full_cloth:
            self.canvas.fill((0, 0, 0), self.cloth)
            for _ in range(draws):
                self._draw_flags()
            self.full_cloth[draws] = self.pixels[area].copy()
        if draws not in self.small_cloth:
            # The cloth hangs in the black sky: wherever else there is something in the strip, the maximum is that.
            both = np.maximum(self.background[area][..., None], self.full_cloth[draws])
            self.small_cloth[draws] = self._shrink(both)
        return self.small_cloth[draws]

    def _draw_flags(self):
        bottom, top = self.flag_y, self.flag_y + 50
        for x in self.flag_x:
            pygame.draw.line(self.canvas, POLE_COLOR, (x, bottom), (x, top), 1)
            cloth = [(x, top), (x, top - 10), (x + 25, top - 5)]
            pygame.draw.polygon(self.canvas, FLAG_COLOR, cloth)
            gfxdraw.aapolygon(self.canvas, cloth, FLAG_COLOR)

    def _whole_pixels(self, rect):
        """`rect` grown to whole small pixels and cut to the picture; empty if it lies outside."""
        f = self.factor
        left, top = max(rect.left // f, 0) * f, max(rect.top // f, 0) * f
        right, bottom = min(-(-rect.right // f) * f, VIEWPORT_W), min(-(-rect.bottom // f) * f, VIEWPORT_H)
        return pygame.Rect(left, top, max(right - left, 0), max(bottom - top, 0))

    def _full(self, rect):
        """Where `rect` is in `pixels`."""
        return slice(rect.top, rect.bottom), slice(rect.left, rect.right)

    def _small(self, rect):
        """Where `rect` is in a small frame, whose rows run downwards."""
        f = self.factor
        rows = slice((VIEWPORT_H - rect.bottom) // f, (VIEWPORT_H - rect.top) // f)
        return slice(None), rows, slice(rect.left // f, rect.right // f)

    def _shrink(self, pixels):
        return shrink(pixels, self.factor, self.color)[:, ::-1]
