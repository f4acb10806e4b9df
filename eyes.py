"""Eyes: where in a frame to look. They see the whole frame coarsely, and one spot of it finely.

    eye = ColourEye(planes=3, size=32)
    eye.calibrate(stacks)                 # frames of random play, uint8 (B, S * planes, H, W)
    crops, positions = eye(frames)        # frames uint8 (B, planes, H, W)

The lander covers 1 % of the picture; what a policy must see of it, its tilt, is a matter of single pixels. Both eyes
find what moves, and nobody tells them what that is: ColourEye by its colour, LearnedEye by its look, in gray, too.
"""

import torch
from torch import nn
from torch.nn import functional as F

NOWHERE = -1e4  # log of an attention of nothing, which a softmax over nothing else still can take
BRIGHT = 0.3 * 255  # something is there, if any of its planes is above
MISSED = 0.3  # the most, in radians, that one comparison corrects a tilt by: of more it tells little
SEEN = 1 / 3  # a body is seen, if so much of it is: of less, at an edge, one cannot tell where it is
MOVED = 0.1 * 255  # a pixel changed if any of its planes did by more than a tenth of their range


class PolicyError(Exception):
    """A policy that cannot begin to train; one line."""


class CalibrationError(PolicyError):
    """Frames that show nothing to learn to look at, because nothing moves in them, or everything."""

    def __init__(self, what="nothing"):
        remedy = {
            "nothing": "a larger env.num_envs or env.frame_skip, or a smaller env.shrink_factor, shows more",
            "everything": "model.eye=learned can tell more apart, and model.eye=none needs nothing to look at"}[what]
        super().__init__(
            f"{what} moves in the first frames of random play, so there is nothing to learn to look at; {remedy}")


class Eye(nn.Module):
    """Finds a spot in each frame, and cuts out the picture around it.

    With `subpixel` it is cut out exactly around that spot, by bilinear interpolation: two degrees of tilt move the feet
    of a lander by a third of a pixel, which would drown in the jumps of a cut along whole pixels.

    It looks at K things, `glimpses`, if a subclass can tell them apart. A subclass has `calibrate(stacks)`;
    `centers(frames)`, roughly the spots, a list of K; and `centroid(cutouts)`, the spot in each of its cut-outs, uint8
    (B, C, size, size). All are columns and rows of pixels, float32 (B, 2).
    """

    # Random play shows it enough to calibrate in so many pictures of each environment, so many decisions apart.
    pictures, decisions_apart = 20, 1

    def __init__(self, planes, size, subpixel=True, glimpses=1):
        super().__init__()
        self.planes, self.size, self.subpixel, self.glimpses = planes, size, subpixel, glimpses

    def cut(self, frames, corner, size):
        """The square of each frame whose upper left pixel is at `corner`, int64 (B, 2): uint8 (B, C, size, size)."""
        planes, height, width = frames.shape[1:]
        span = torch.arange(size, device=frames.device)
        columns = (corner[:, :1] + span).clamp(max=width - 1)  # (B, size); beyond an edge, its last pixel again
        rows = (corner[:, 1:] + span).clamp(max=height - 1)
        index = rows[:, :, None] * width + columns[:, None, :]  # (B, size, size)
        return frames.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, planes, -1)).unflatten(2, (size, size))

    def limit(self, frames):
        """The largest column and row at which a cut-out may begin, int64 (2,)."""
        height, width = frames.shape[2:]
        return torch.tensor([width - self.size, height - self.size], device=frames.device)

    def corner(self, frames, center):
        """The upper left of the cut-out around `center` in which the spot is measured, whole pixels: float32 (B, 2)."""
        limit = self.limit(frames)
        return (center - self.size / 2).round().clamp(torch.zeros_like(limit), limit)

    @torch.no_grad()
    def find(self, frames):
        """frames uint8 (B, C, H, W) -> the spots, and the upper left of their cut-outs, both float32 (B, K, 2).

        Both are columns and rows of pixels; without `subpixel` the latter are whole.
        """
        spots, corners, limit = [], [], self.limit(frames)
        with torch.autocast(frames.device.type, enabled=False):  # positions are finer than bfloat16 can tell
            for center in self.centers(frames):
                corner = self.corner(frames, center)
                spots.append(corner + self.centroid(self.cut(frames, corner.long(), self.size)))
                if self.subpixel:
                    corner = (spots[-1] - (self.size - 1) / 2).clamp(torch.zeros_like(limit), limit)
                corners.append(corner)
            return torch.stack(spots, 1), torch.stack(corners, 1)

    @torch.no_grad()
    def forward(self, frames):
        """frames uint8 (B, C, H, W) -> (crops, positions) of what it looks at.

        crops: uint8 (B, C, K * size, size), K cut-outs, one below the other. positions: float32 (B, 2 * K), x and y of
        each spot in -1..1.
        """
        height, width = frames.shape[2:]
        spots, corners = self.find(frames)
        with torch.autocast(frames.device.type, enabled=False):
            crops = torch.cat([self.between_pixels(frames, corner) for corner in corners.unbind(1)], 2)
            spots, more = self.look_closely(crops, spots, corners)
            positions = spots / torch.tensor([(width - 1) / 2, (height - 1) / 2], device=frames.device) - 1
            return crops, torch.cat([positions.flatten(1), more], 1)

    def look_closely(self, crops, spots, corners):
        """(the spots, better known; what else the eye says of each frame): float32 (B, K, 2) and (B, M - 2 * K)."""
        return spots, spots[:, 0, :0]

    def between_pixels(self, frames, corner):
        """As `cut`, of `size`, at a corner between pixels, float32 (B, 2), by bilinear interpolation."""
        x, y = corner.frac()[:, :, None, None, None].unbind(1)
        crops = self.cut(frames, corner.long(), self.size + 1).float()  # one pixel more, to mix neighbours
        crops = torch.lerp(crops[..., :-1], crops[..., 1:], x)
        return torch.lerp(crops[..., :-1, :], crops[..., 1:, :], y).round().byte()


def mean_place(attention):
    """attention (B, h, w), which sums to 1 -> (B, 2): x in 0..w-1, y in 0..h-1."""
    x = torch.arange(attention.shape[2], dtype=torch.float32, device=attention.device)
    y = torch.arange(attention.shape[1], dtype=torch.float32, device=attention.device)
    return torch.stack([attention.sum(1) @ x, attention.sum(2) @ y], 1)


class ColourEye(Eye):
    """Looks at the colour of what moves: a direction of red, green, blue, found once from frames alone.

    Attention is the softmax of the pixels' scores along that direction. With `tilt` it also measures how what it looks
    at lies, finds its middle more finely, and knows whether it sees it: positions are then float32 (B, 4), x, y, the
    tilt, and 1 or 0.
    """

    def __init__(self, planes, size, subpixel=True, tilt=False, stride=4, sharpness=40.0):
        super().__init__(planes, size, subpixel)  # one glimpse: all of a colour is one thing to it
        self.tilt, self.stride, self.sharpness, self.margin = tilt, stride, sharpness, size // 8
        self.register_buffer("direction", torch.zeros(planes))
        if tilt:
            side = size - 2 * self.margin
            self.register_buffer("look", torch.zeros(1, side, side))  # of an upright body

    @torch.no_grad()
    def calibrate(self, stacks):
        """Fisher's linear discriminant (1936) between pixels that changed and all pixels.

        stacks: uint8 (B, S * 3, H, W), S frames each, of which the last two count. CalibrationError if nothing moved.
        """
        sums, products, moving = 0, 0, 0  # of pixels (C,), of their products (C, C), of pixels that changed (C,)
        num_pixels = num_moving = 0
        for some in stacks[:, -2 * self.planes :].split(32):  # whole frames of many environments fill the memory
            before, after = some.float().div(255).chunk(2, dim=1)
            moved = ((after - before).abs().amax(1).flatten() > MOVED / 255).cpu()  # (b * H * W,)
            pixels = after.permute(0, 2, 3, 1).reshape(-1, self.planes).cpu().double()  # not every GPU has float64
            sums, products, moving = sums + pixels.sum(0), products + pixels.T @ pixels, moving + pixels[moved].sum(0)
            num_pixels, num_moving = num_pixels + len(pixels), num_moving + int(moved.sum())
        if num_moving in (0, num_pixels):
            raise CalibrationError("everything" if num_moving else "nothing")
        mean = sums / num_pixels
        covariance = (products - num_pixels * mean.outer(mean)) / (num_pixels - 1)
        covariance += 1e-4 * torch.eye(self.planes, dtype=torch.float64)
        direction = torch.linalg.solve(covariance, moving / num_moving - mean)
        self.direction.copy_(direction / direction.norm())
        if self.tilt:
            self._learn_look(stacks[:, -self.planes :])

    def _learn_look(self, frames):
        """What the body looks like once it is turned upright: the median of frames in which no edge cuts it off.

        Not the mean, since in some the tilt is wrong, or nothing is seen.
        """
        spots, corners = self.find(frames)
        around = self.from_middle(spots, corners)
        inside = around.norm(dim=1) < 1
        crops, around = self.between_pixels(frames, corners[:, 0])[inside], around[inside]
        self.look.zero_()
        if not inside.any():
            return
        pictures, axes = self.bodies(crops, self.scores(crops))
        for _ in range(3):  # at first the tilt comes from the mirror alone
            tilts, places = self.lies(pictures, axes, around)
            upright, seen = rotate(pictures, -tilts, places).unbind(1)
            look = upright.masked_fill(seen < 0.5, torch.nan).nanmedian(0).values.nan_to_num(0)
            self.look.copy_((look + look.flip(1)) / 2)

    def centers(self, frames):
        """[roughly the spot, float32 (B, 2)]: every stride-th pixel is enough to find it."""
        return [self.centroid(frames[:, :, :: self.stride, :: self.stride]) * self.stride]

    def centroid(self, frames):
        """Mean place under the attention. Pixels 0 to 255, (B, 3, h, w) -> (B, 2): x in 0..w-1, y in 0..h-1."""
        scores = self.scores(frames)
        return mean_place(scores.flatten(1).softmax(1).view_as(scores))

    def scores(self, frames):
        """log of the attention but for a constant, (B, 3, h, w) -> float32 (B, h, w)."""
        return (self.sharpness / 255 * self.direction @ frames.float().flatten(2)).unflatten(1, frames.shape[2:])

    def look_closely(self, crops, spots, corners):
        if not self.tilt:
            return super().look_closely(crops, spots, corners)
        around, scores = self.from_middle(spots, corners), self.scores(crops)
        tilts, places = self.lies(*self.bodies(crops, scores), around)
        seen = scores.clamp(min=0).sum((1, 2)) > SEEN * self.look.sum()
        return spots + (places - around)[:, None], torch.stack([tilts, seen.float()], 1)

    def from_middle(self, spots, corners):
        """Columns and rows from the middle of each cut-out to the spot, float32 (B, 2)."""
        return (spots - corners)[:, 0] - (self.size - 1) / 2

    def lies(self, pictures, axes, around):
        """(tilts, places) of what it looks at, in each cut-out.

        pictures, axes: as `bodies` gives them. around: float32 (B, 2), columns and rows from the middle of the cut-out
        to the spot. tilts: radians, float32 (B,), clockwise, about between -pi/2 and pi/2, and 0 where nothing of that
        colour is seen. places: as around, of the middle of the body.

        First the axis along which it is long (the principal axes of Hu 1962, "Visual pattern recognition by moment
        invariants"). That is right within a thirtieth of a radian, too little to see how fast a lander turns, and wrong
        where something hides a part of it, as the flags of the pad do. So it is turned upright by most of this angle,
        and compared, blurred, with its mirror image, as a body that is its own mirror image allows: half of the turn
        between them is what was missed, half of the shift how far the spot lies to one side. Then with what the body
        looks like, found in the first frames. It is sharper, and does not change with flames and flags, which the spot
        does.
        """
        blurred = torch.cat([blur(pictures[:, :1]), pictures[:, 1:]], 1)
        tilts, places = self.closer(blurred, axes, around)
        return self.closer(pictures, tilts, places, self.look if self.look.any() else None)

    def bodies(self, crops, scores):
        """(pictures, axes): what is of its colour and what can be seen, float32 (B, 2, n, n); radians, float32 (B,).

        scores: those of the crops, float32 (B, h, w). What is bright and not of its colour hides it, and where nothing
        is of it, nothing can be seen. The shape that is long is where the attention is more than a tenth of its
        highest, once it is made four times less sharp: it shall cover all of a body, while a spot is best where it is
        surest.
        """
        highest = scores.amax((1, 2), keepdim=True)
        axes = long_axis((((scores - highest) / 4).exp() - 0.1).clamp(min=0))
        other = (crops.amax(1) > BRIGHT) & (scores < highest / 10)
        pictures = F.pad(torch.stack([scores.clamp(min=0), other.float()], 1), [-self.margin] * 4)
        body, other = blur(pictures).split(1, dim=1)
        there = highest > 0
        seen = (other == 0) & there[:, None]  # nor do the edges of what is in front, which are a mixture
        return torch.cat([body, seen.float()], 1), 0.75 * torch.where(there[:, 0, 0], axes, 0)

    def closer(self, pictures, tilts, places, look=None):
        """(tilts, places) that explain pictures of `bodies` better: by `look`, (1, n, n), or by its mirror image."""
        upright, seen = rotate(pictures, -tilts, places).unbind(1)
        if look is None:
            turns, shifts = (0.5 * change for change in move(upright.flip(2), upright, seen * seen.flip(2)))
        else:
            turns, shifts = move(look.expand_as(upright), upright, seen)
        cos, sin, (x, y) = tilts.cos(), tilts.sin(), shifts.clamp(-1, 1).unbind(1)
        return tilts + turns.clamp(-MISSED, MISSED), places + torch.stack([x * cos - y * sin, x * sin + y * cos], 1)


def blur(pictures):
    """Each pixel the mean of itself and the eight around it, beyond an edge 0: float32 (B, C, h, w) -> same.

    On a CPU this takes a fifth of the time of F.avg_pool2d.
    """
    pictures = F.pad(pictures, [1] * 4)
    rows = pictures[..., :-2, :] + pictures[..., 1:-1, :] + pictures[..., 2:, :]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9


def long_axis(shapes):
    """The angle of the axis along which each is long, the principal one: float32 (B, h, w) -> (B,), clockwise."""
    shapes = shapes / shapes.sum((1, 2), keepdim=True)
    columns, rows = (torch.arange(n, device=shapes.device) for n in (shapes.shape[2], shapes.shape[1]))
    mean_x, mean_y = mean_place(shapes).unbind(1)
    x, y = columns - mean_x[:, None], rows - mean_y[:, None]
    xx, yy = (shapes.sum(1) * x**2).sum(1), (shapes.sum(2) * y**2).sum(1)
    xy = torch.einsum("byx,bx,by->b", shapes, x, y)
    return torch.atan2(2 * xy, xx - yy) / 2


def rotate(pictures, angles, around):
    """Each picture, float32 (B, C, n, n), turned clockwise by radians (B,), around what then lies in its middle.

    around: float32 (B, 2), columns and rows from the middle.
    """
    cos, sin = angles.cos(), angles.sin()
    x, y = (around * (2 / pictures.shape[2])).unbind(1)
    matrix = torch.stack([cos, sin, x, -sin, cos, y], 1).view(-1, 2, 3)  # where each pixel comes from
    return F.grid_sample(pictures, F.affine_grid(matrix, pictures.shape, align_corners=False), align_corners=False)


def move(before, after, weights):
    """How what is in the middle of two pictures moved between them: (turns, shifts).

    before, after, weights: float32 (B, n, n). turns: radians, float32 (B,), clockwise. shifts: float32 (B, 2), columns
    and rows; 0 where the pictures do not tell. The small turn and shift that best explain the change, weighted least
    squares over all pixels, the middle weighted most (Lucas & Kanade 1981, "An iterative image registration
    technique").
    """
    size = after.shape[2]
    place = torch.arange(size, device=after.device)[1:-1] - (size - 1) / 2
    y, x = place[:, None], place[None, :]
    weights = (weights[:, 1:-1, 1:-1] * torch.exp(-(x**2 + y**2) / (2 * (size / 3) ** 2))).flatten(1)
    mean = (before + after) / 2
    slope_x = (mean[:, 1:-1, 2:] - mean[:, 1:-1, :-2]) / 2
    slope_y = (mean[:, 2:, 1:-1] - mean[:, :-2, 1:-1]) / 2
    change = (after - before)[:, 1:-1, 1:-1].flatten(1)
    effects = torch.stack([slope_x * y - slope_y * x, -slope_x, -slope_y], 1).flatten(2)  # of a unit of turn and shifts
    weighted = effects * weights[:, None]
    normal = weighted @ effects.transpose(1, 2) + 1e-6 * torch.eye(3, device=after.device)  # nothing seen: no turn
    solution, failed = torch.linalg.solve_ex(normal, (weighted @ change[:, :, None])[:, :, 0])
    solution = solution.masked_fill((failed != 0)[:, None], 0).nan_to_num(0, 0, 0)
    return solution[:, 0], solution[:, 1:]


class LearnedEye(Eye):
    """Looks at what looks, in a still frame, like what will move: two small networks learn it from frames alone.

    The coarse one sees every second row and column of the whole frame, and points at one of its squares of 4 x 4
    pixels; the fine one points at pixels of the cut-out around that square. The spot is the mean place under the fine
    one's attention. Nothing but frames teaches them:

    - What changes between two frames is what moved. The loss of both is -log of the share of their attention, a
      softmax, that lies on pixels that changed. So they must be sure of some of what moves, not find all of it.
    - What moves has inertia. How much the spot's velocity changes from frame to frame, its acceleration, is a loss of
      the fine one, which thus prefers the body to the flames that come and go.
    - The entropy of the fine attention is a bonus: it shall lie on all of the body, and the spot in its middle.

    With `mirror` a mirror image is looked at in the mirrored place, lest the spot drift to one side of a body.

    With several `glimpses`, the next is around the likeliest square outside of those before it, and learns from what
    changed outside of them.

    They learn before training from random play (`calibrate`), and go on in each update (`loss`).
    """

    pictures, decisions_apart = 60, 4  # random play then comes down to the ground, again and again
    inertia_coef, entropy_coef = 2.0, 0.2

    def __init__(self, planes, size, subpixel=True, glimpses=1, mirror=False, channels=16):
        super().__init__(planes, size, subpixel, glimpses)
        self.coarse = nn.Sequential(
            nn.Conv2d(planes, channels, 4, stride=2, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(channels, 1, 1))
        self.fine = nn.Sequential(  # dilated, to see a whole lander: 13 pixels
            nn.Conv2d(planes, channels // 2, 5, padding=2), nn.ReLU(inplace=True),
            nn.Conv2d(channels // 2, channels, 3, padding=2, dilation=2), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=2, dilation=2), nn.ReLU(inplace=True), nn.Conv2d(channels, 1, 1))
        for module in self.modules() if mirror else ():
            if isinstance(module, nn.Conv2d):
                keep_symmetric(module.weight)

    @staticmethod
    def attention(network, frames):
        """log of the attention, float32 (B, h, w), for pixels 0 to 255."""
        frames = frames.to(torch.float32, memory_format=torch.channels_last)  # a CPU convolves these twice as fast
        scores = network(frames.div_(255).sub_(0.25))[:, 0]
        return scores.flatten(1).log_softmax(1).view_as(scores)

    def squares(self, frames):
        """log of the coarse attention, float32 (B, H // 4, W // 4)."""
        height, width = frames.shape[2] // 4 * 4, frames.shape[3] // 4 * 4
        return self.attention(self.coarse, frames[:, :, :height:2, :width:2])

    def centers(self, frames):
        return [center for _, _, center in self.looks(self.squares(frames))]

    def looks(self, squares):
        """Of each thing to look at, the likeliest first: (log_attention, free, center).

        squares: float32 (B, h, w), as `squares` gives them. log_attention is theirs over what earlier cut-outs left
        free, bool (B, h, w); center the middle of its likeliest square, float32 (B, 2): of two places, better one than
        between them.
        """
        columns = squares.shape[2]
        y, x = torch.meshgrid(*(torch.arange(n, device=squares.device) for n in squares.shape[1:]), indexing="ij")
        free = torch.ones_like(squares, dtype=torch.bool)
        for left in reversed(range(self.glimpses)):
            best = squares.detach().flatten(1).argmax(1)
            column, row = best % columns, best // columns
            yield squares, free, torch.stack([column, row], 1) * 4 + 1.5
            if left:
                apart = torch.maximum((x - column[:, None, None]).abs(), (y - row[:, None, None]).abs())
                free = free & (4 * apart >= self.size)  # cut-outs do not overlap, or both would find the same
                squares = squares.masked_fill(~free, NOWHERE).flatten(1).log_softmax(1).view_as(squares)

    def centroid(self, cutouts):
        return mean_place(self.attention(self.fine, cutouts).exp())

    def loss(self, stacks):
        """The loss on stacks of frames, uint8 (B, S, C, H, W), S >= 3: a scalar."""
        b, s = stacks.shape[:2]
        # Each frame is compared with the farthest in its stack: the farther, the more of a body has moved.
        others = [s - 1 if i < s / 2 else 0 for i in range(s)]
        changed = (stacks.short() - stacks[:, others].short()).abs().amax(2).flatten(0, 1) > MOVED  # (B * S, H, W)
        frames, changed = stacks.flatten(0, 1), changed[:, None].float()
        with torch.autocast(frames.device.type, enabled=False):
            squares = F.max_pool2d(F.pad(changed, (2, 2, 2, 2)), 8, stride=4)  # what `coarse` sees of each
            total = 0
            for coarse, free, center in self.looks(self.squares(frames)):
                corner = self.corner(frames, center)
                fine = self.attention(self.fine, self.cut(frames, corner.long(), self.size))
                spot = (corner + mean_place(fine.exp())).view(b, s, 2)
                acceleration = spot[:, 2:] - 2 * spot[:, 1:-1] + spot[:, :-2]  # pixels per decision squared
                near = acceleration.detach().norm(dim=2) < self.size / 8  # farther apart are two things, one by mistake
                inertia = F.huber_loss(acceleration, torch.zeros_like(acceleration), reduction="none").sum(2)
                inertia = (inertia * near).mean()
                entropy = -(fine.exp() * fine).flatten(1).sum(1).mean()
                missed = self.missed(coarse, squares * free[:, None])
                missed = missed + self.missed(fine, self.cut(changed, corner.long(), self.size))
                total = total + missed + self.inertia_coef * inertia - self.entropy_coef * entropy
            return total / self.glimpses

    @staticmethod
    def missed(log_attention, changed):
        """-log of the share of attention on what changed, a mean over B frames. changed: float (B, ..., h, w), 0 or 1.

        A frame counts as much as pixels changed in it: of a body that hardly moves, only the edges change.
        """
        changed = changed.flatten(1)
        weight = changed.sum(1)
        off = (changed == 0) & (weight > 0)[:, None]
        hit = log_attention.flatten(1).masked_fill(off, -torch.inf).logsumexp(1)
        return -(hit * weight).sum() / weight.sum().clamp(min=1)

    def calibrate(self, stacks, steps=300, batch=16):
        """Learn from frames of random play, uint8 (B, S * C, H, W); CalibrationError if nothing moves in them."""
        stacks = stacks.unflatten(1, (-1, self.planes))
        ends = zip(stacks[:, 0], stacks[:, -1], strict=True)  # one by one, since they are many
        if not any(((last.short() - first.short()).abs() > MOVED).any() for first, last in ends):
            raise CalibrationError
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        for _ in range(steps):
            loss = self.loss(stacks[torch.randint(len(stacks), (batch,)).to(stacks.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.zero_grad()


def keep_symmetric(kernels):
    """Make kernels, (C', C, h, w), their own mirror images. They stay so, since their gradients then are, too."""
    with torch.no_grad():
        kernels.copy_((kernels + kernels.flip(3)) / 2)
    kernels.register_hook(lambda gradient: (gradient + gradient.flip(3)) / 2)


EYES = {"colour": ColourEye, "learned": LearnedEye}
