"""What policies are built of: layers, and how pictures get to them."""

import torch
from torch import nn
from torch.nn import functional as F

from eyes import mean_place

PLACES, PLACE_WIDTH = 8, 32  # of an AttentionPool: places at once, and numbers that say what is at one


def orthogonal(layer, gain=2**0.5):
    """Orthogonal weights and zero bias, returned (Andrychowicz et al. 2021, arXiv:2006.05990, sec. 3.2)."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def channels_last(pictures, dtype=torch.float32):
    """uint8 (B, C, h, w) -> a new float tensor in the layout in which convolutions are fastest."""
    return pictures.contiguous(memory_format=torch.channels_last).to(dtype)  # moved while a pixel is still one byte


def autocast_dtype(device):
    """In which numbers convolutions on this device compute now; bfloat16 holds pixels, 0 to 255, exactly."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def view_ids(frame_ids, mirrored=None):
    """What `take` finds the pictures of frames by: the rows frame_ids, int64 (B, S), in the mirror where mirrored (B,).

    int64 (B, S): 2 * row, + 1 for that in the mirror.
    """
    return 2 * frame_ids if mirrored is None else 2 * frame_ids + mirrored[:, None]


def take(pictures, views):
    """Of pictures (N, V, C, h, w) those of `views`, int64 (B,), as view_ids says them -> (B, C, h, w).

    V is 2, or 1 if nothing is ever seen in the mirror. index_select copies whole pictures, where indexing goes byte by
    byte and takes ten times as long.
    """
    return pictures.flatten(0, 1).index_select(0, views if pictures.shape[1] == 2 else views // 2)


class PixelConv(nn.Conv2d):
    """A convolution, without padding, of pixels that it takes as -0.25 to 0.75 where they are 0 to 255.

    Not the pixels are scaled but, which is the same and costs nothing, the weights.
    """

    def forward(self, pictures):
        """Pixels 0 to 255, (B, inputs, h, w) -> (B, outputs, h', w')."""
        bias = self.bias - 0.25 * self.weight.sum((1, 2, 3))
        return F.conv2d(pictures, self.weight / 255, bias, self.stride)


class MirrorConv(nn.Conv2d):
    """A convolution that knows what it would say of the mirror image: a group convolution.

    (Cohen & Welling 2016, arXiv:1602.07576; here the group is that of reflections.) The second half of the channels is
    the first half with its kernels turned around. So the maps of a mirrored picture are the maps of the picture,
    mirrored, with the two halves swapped: `mirror_image`. With stride 2 that takes an even kernel on an even width, an
    odd one on an odd width.
    """

    def __init__(self, inputs, outputs, *args, **kwargs):
        super().__init__(inputs, outputs // 2, *args, **kwargs)

    def forward(self, maps):
        """Maps whose second half of channels is the mirror image of the first: (B, C, h, w) -> (B, outputs, h', w')."""
        return convolve_both(self, maps, self.weight, self.weight.roll(self.in_channels // 2, 1))


def convolve_both(conv, maps, weight, other):
    """`conv` with these kernels, and then with those for the mirror image: `other`, which are here turned around."""
    return F.conv2d(maps, torch.cat([weight, other.flip(3)]), conv.bias.repeat(2), conv.stride, conv.padding)


def mirror_image(maps):
    """What MirrorConvs make of the mirror image of that of which they made `maps`, (B, C, h, w) -> same."""
    return maps.roll(maps.shape[1] // 2, 1).flip(3)


def swap_sides(places, mirrored):
    """Places (B, ..., 2), x and y from the middle, with left and right swapped where `mirrored`, bool (B,)."""
    x, y = places.unbind(-1)
    return torch.stack([torch.where(mirrored.view(-1, *[1] * (x.ndim - 1)), -x, x), y], -1)


class ChangeConv(nn.Conv2d):
    """A convolution over S stacked frames that sees the newest one, and what changed from each frame to the next.

    Most of what stands still is then zero, so what moves stands out from the first update on. The differences are not
    made of the pixels, but, which is the same and costs nothing, of the weights. With `mirror`, the second half of the
    channels is the mirror image of the first, as a MirrorConv wants it.
    """

    def __init__(self, frame_stack, planes, outputs, *args, mirror=False, **kwargs):
        super().__init__(frame_stack * planes, outputs // 2 if mirror else outputs, *args, **kwargs)
        self.mirror = mirror
        views = torch.zeros(frame_stack, frame_stack)  # row: what is seen; column: of which frame, oldest first
        views[0, -1] = 1
        for i in range(1, frame_stack):
            views[i, i], views[i, i - 1] = 2, -2  # about as large as the frame itself
        self.register_buffer("views", views / 255, persistent=False)

    def forward(self, pictures):
        """Pixels 0 to 255, (B, S * planes, h, w), oldest frame first -> (B, outputs, h', w')."""
        weight = self.weight.unflatten(1, (len(self.views), -1))  # (C, S, planes, kh, kw)
        weight = torch.einsum("csphw,sf->cfphw", weight, self.views).flatten(1, 2)
        if self.mirror:
            return convolve_both(self, pictures, weight, weight)
        return F.conv2d(pictures, weight, self.bias, self.stride, self.padding)


def convolve_changes(frame_stack, planes, mirror=False):
    """Three convolutions over S stacked frames: pixels 0 to 255, (B, S * planes, h, w) -> (B, 64, h / 4, w / 4).

    With `mirror` they know the mirror image, as MirrorConvs do.
    """
    conv = MirrorConv if mirror else nn.Conv2d
    return nn.Sequential(
        orthogonal(ChangeConv(frame_stack, planes, 16, 6, stride=2, padding=2, mirror=mirror)), nn.ReLU(),
        orthogonal(conv(16, 32, 3, stride=2, padding=1)), nn.ReLU(),
        orthogonal(conv(32, 64, 3, padding=1)))


class AttentionPool(nn.Module):
    """Looks at some places of a map at once, and says what is there and where: attention with learned queries.

    (Lee et al. 2019, "Set Transformer", arXiv:1810.00825, sec. 3.2, pool a set so; the mean place under the attention
    is the spatial softmax of Levine et al. 2016, arXiv:1504.00702.) A flattened map has weights of its own for each
    place of a lander, and must see it at all of them to learn; here what is learned at one is known at all.
    """

    SHARPNESS = 3.0  # so that at first the attention is neither spread over all of the map nor nailed to one place
    outputs = PLACES * (PLACE_WIDTH + 2)

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Linear(channels, PLACES)
        self.value = nn.Linear(channels, PLACE_WIDTH)

    def forward(self, maps):
        """(B, C, h, w) -> float32 (B, outputs): what is at each place; then, in the last 2 * PLACES, its x and y.

        They lie between -1 and 1.
        """
        tokens = maps.flatten(2).transpose(1, 2)  # (B, h * w, C)
        attention = (self.SHARPNESS * self.query(tokens).float()).softmax(1).transpose(1, 2)  # (B, PLACES, h * w)
        what = self.value(attention @ tokens).float()
        height, width = maps.shape[2:]
        with torch.autocast(maps.device.type, enabled=False):  # places are finer than bfloat16 can tell
            where = mean_place(attention.reshape(-1, height, width))
            middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=maps.device)  # 0 of a side of one pixel
            where = where / middle.clamp(min=0.5) - (middle > 0).float()
        return torch.cat([what.flatten(1), where.view(len(maps), -1)], 1)


def transformer(width, heads, layers, residual_gain=0.1):
    """A pre-norm Transformer encoder, (B, L, width) -> same, that starts near the identity.

    Small weights where each residual branch ends keep the first PPO updates from tearing what is not yet learned
    (Parisotto et al. 2020, arXiv:1910.06764, start their gated Transformer near the identity for the same reason).
    """
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
    for block in encoder.layers:  # copies of one layer, so drawn again
        nn.init.xavier_uniform_(block.self_attn.in_proj_weight)
        nn.init.xavier_uniform_(block.linear1.weight)
        nn.init.xavier_uniform_(block.self_attn.out_proj.weight, residual_gain)
        nn.init.xavier_uniform_(block.linear2.weight, residual_gain)
    return encoder
