"""An episode in one picture: what moves, at a dozen moments, over what does not."""

import numpy as np

MOMENTS = 12  # at which what moves is shown
KEPT = 100  # frames at most; of a longer episode every second, fourth, ... is kept
CHANGE = 24  # of 255: by so much a pixel differs from the still picture where something moves
WIDTH = 600  # pixels of the picture, about: small frames are enlarged by a whole factor


class FlightRecorder:
    """For `evaluate.play`: keeps frames of the first episode as the policy sees them; it has none drawn."""

    def __init__(self):
        self.frames, self.every, self.decisions = [], 1, 0  # frames: uint8 (C, H, W), oldest first

    def begin(self, index, env):
        pass

    def decide(self, index, env, frames, output, row, action):
        if index:
            return
        if self.decisions % self.every == 0:
            self._keep(frames, env)
        self.decisions += 1
        if len(self.frames) == KEPT:
            self.frames, self.every = self.frames[::2], 2 * self.every

    def end(self, index, env):
        if not index:
            self._keep(env.stack.frames, env)

    def _keep(self, stack, env):
        self.frames.append(stack[-env.stack.planes:].copy())

    def picture(self):
        """uint8 (H, W, 3), as a multiple exposure of a camera that stands still."""
        frames = np.stack(self.frames)  # (T, C, H, W)
        moments = frames[np.linspace(0, len(frames) - 1, min(MOMENTS, len(frames))).round().astype(int)]
        still = np.median(frames, axis=0).astype(np.uint8)
        picture = still.copy()
        for frame in moments:
            moved = np.abs(frame.astype(int) - still).max(0) > CHANGE  # (H, W)
            picture[:, moved] = frame[:, moved]
        picture = np.broadcast_to(picture, (3, *picture.shape[1:])).transpose(1, 2, 0)
        factor = max(1, WIDTH // picture.shape[1])
        return picture.repeat(factor, 0).repeat(factor, 1)
