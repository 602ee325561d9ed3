"""A crop is a matrix: random crops and colour changes of a whole batch at once, on any device.

A view of an image is a map theta (2, 3) from the view's coordinates to the image's, both in [-1, 1] as in
`F.affine_grid` (align_corners=False):

    [x_image, y_image]^T = theta [x_view, y_view, 1]^T,    theta = [[+-w, 0, cx], [0, h, cy]]

w and h are the crop's fractions of width and height, (cx, cy) is its centre, and a negative w is a flip. The
same theta samples the image, its masks and its priors, so they stay aligned. Two maps in turn are one matrix
product. Colour is a matrix too: saturation, hue and grey are one 3x3 matrix per image.

Recipe and strengths are those of DINO (Caron et al. 2021, arXiv 2104.14294, from BYOL): jitter, grey, blur,
solarise. Where we differ: all random numbers come from one CPU generator, so a seed gives the same views on
every device. A crop larger than the image is clipped to it instead of drawn again. Where a crop is enlarged,
its pixels within half a pixel of the image's border fade toward 0. Blur is given for 224 px and scaled to the
view. By default there are no flips and no local crops; if used, these show at least 10 % of the area (there:
5 %). Contrast uses the mean of all channels, hue turns in YIQ (there: HSV), and colour changes have a fixed
order. Aspect ratios are relative to the image's (there: in pixels). Sampling is bilinear, not antialiased, so
downscale much larger images first.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def random_crops(n: int, scale: tuple[float, float], generator: Generator, flip: float = 0.0) -> Tensor:
    """Draw n random resized crops: theta (n, 2, 3), on the CPU.

    scale: smallest and largest fraction of the image's area, in (0, 1], before clipping; flip: probability of
    a mirror image. Width to height, relative to the image's own, is 3/4 to 4/3. Raises ValueError for an
    impossible scale.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"crop scale {scale}: give two fractions of the area, 0 < a <= b <= 1")
    area, aspect, across, down, mirror = torch.rand(5, n, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = 3 / 4 * (16 / 9) ** aspect  # log-uniform from 3/4 to 4/3, so that both are as likely
    w, h = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    cx, cy = (2 * across - 1) * (1 - w), (2 * down - 1) * (1 - h)
    w = torch.where(mirror < flip, -w, w)
    zero = torch.zeros(n)
    return torch.stack([w, zero, cx, zero, h, cy], dim=1).view(n, 2, 3)


def crop(images: Tensor, theta: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Views (B, C, h, w) of `size` px of images (B, C, H, W) at theta (B, 2, 3): bilinear, 0 outside.

    The gradient reaches the images, not theta. Half-precision images are sampled in float32.
    """
    h, w = (size, size) if isinstance(size, int) else size
    x, y = ((torch.arange(n, device=theta.device) * 2 + 1) / n - 1 for n in (w, h))  # centres of pixels
    # The same points as F.affine_grid, whose matrix product would take longer than the sampling.
    kind = torch.promote_types(images.dtype, torch.float32)  # in half precision, points would be pixels off
    grid = torch.empty(len(theta), 2, h, w, device=theta.device, dtype=kind)
    for i in range(2):
        a, b, c = theta.detach()[:, i, :, None, None].unbind(1)  # (B, 1, 1) each
        torch.add(a * x + c, b * y[:, None], out=grid[:, i])
    points = grid.permute(0, 2, 3, 1)  # (B, h, w, 2)
    views = F.grid_sample(images.to(kind), points, padding_mode="zeros", align_corners=False)
    return views.to(images.dtype)


def distort(images: Tensor, generator: Generator, blur: float = 0.5, solarise: float = 0.0) -> Tensor:
    """Change the colours of each of the images (B, C, H, W) in [0, 1] at random, within the same range.

    blur, solarise: the probability of each. Jitter (probability 0.8) changes brightness and contrast by up to
    40 %, and in RGB saturation by 20 % and hue by 36 degrees; a fifth of RGB images turn grey.
    """
    B, C = images.shape[:2]
    chance = torch.rand(4, B, generator=generator)  # of jitter, grey, blur, solarisation
    strength = torch.rand(5, B, generator=generator)  # of brightness, contrast, saturation, hue, blur
    jitter = (chance[0] < 0.8).float()
    most = torch.tensor([[0.4], [0.4], [0.2]])
    brightness, contrast, saturation = 1 + most * jitter * (2 * strength[:3] - 1)
    hue = jitter * 0.2 * torch.pi * (2 * strength[3] - 1)  # radians
    if C == 3:
        matrix = colour_matrix(saturation * (chance[1] >= 0.2), hue).to(images)  # (B, 3, 3)
        images = (matrix @ images.flatten(2)).view_as(images)
    # brightness * (mean + contrast * (x - mean)) = gain * x + lift * mean
    both = torch.stack([brightness * contrast, brightness * (1 - contrast)])
    gain, lift = both.view(2, B, 1, 1, 1).to(images)
    images = (images * gain).add_(lift * images.mean(dim=(1, 2, 3), keepdim=True)).clamp_(0, 1)
    blurred = (chance[2] < blur).nonzero()[:, 0]
    if len(blurred):
        sigma = (0.1 + 1.9 * strength[4][blurred]) * images.shape[-1] / 224
        blurred = blurred.to(images.device)
        images[blurred] = gaussian_blur(images[blurred], sigma)
    inverted = (chance[3] < solarise).nonzero()[:, 0].to(images.device)
    bright = images[inverted]
    images[inverted] = torch.where(bright >= 0.5, 1 - bright, bright)
    return images


def multi_crop(
    images: Tensor, generator: Generator, size: int, local_size: int = 0,
    global_scale: tuple[float, float] = (0.4, 1.0), local_scale: tuple[float, float] = (0.1, 0.4),
    locals_number: int = 0, flip: float = 0.0,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """DINO's views of images (B, C, H, W) in [0, 1], one entry per resolution, and their theta.

    The first entry holds two global views of `size` px (2 B, C, size, size): the first of every image, always
    blurred, then the second, blurred with probability 0.1 and solarised with 0.2. If locals_number V > 0, the
    second holds the local views (V B, C, local_size, local_size). thetas: (2 B, 2, 3) and (V B, 2, 3). Raises
    ValueError for other images and for local views without a size. Call it outside autocast, which would
    round pixels.
    """
    B, V = len(images), locals_number
    # Resizing may overshoot a little, which `distort` clamps.
    if not images.is_floating_point() or images.min() < -0.3 or images.max() > 1.3:
        raise ValueError("multi_crop needs float images in [0, 1]: normalise the views, not the images")
    if V and local_size < 1:
        raise ValueError(f"{V} local views of {local_size} px: give local_size")
    theta = random_crops(2 * B, global_scale, generator, flip=flip).to(images.device)
    first, second = crop(images.repeat(2, 1, 1, 1), theta, size).split(B)
    views = torch.cat([distort(first, generator, 1.0, 0.0), distort(second, generator, 0.1, 0.2)])
    if not V:
        return [views], [theta]
    local_theta = random_crops(V * B, local_scale, generator, flip=flip).to(images.device)
    local = distort(crop(images.repeat(V, 1, 1, 1), local_theta, local_size), generator, 0.5, 0.0)
    return [views, local], [theta, local_theta]


def colour_matrix(saturation: Tensor, hue: Tensor) -> Tensor:
    """Matrices (B, 3, 3) that scale chroma by saturation (B,) and rotate it by hue (B,) radians, in YIQ."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turn = torch.zeros(len(hue), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * hue.cos()
    turn[:, 1, 2] = -saturation * hue.sin()
    turn[:, 2, 1] = saturation * hue.sin()
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur images (B, C, H, W), each by its own sigma (B,) in pixels; borders are repeated outward."""
    B, C, H, W = images.shape
    radius = min(max(1, int(3 * sigma.max() + 0.5)), H - 1, W - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma.to(images)[:, None] ** 2))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(C, dim=0)[:, None]  # (B * C, 1, k)
    x = F.pad(images.reshape(1, B * C, H, W), [radius] * 4, mode="replicate")
    x = F.conv2d(x, kernel[:, :, None, :], groups=B * C)  # across
    return F.conv2d(x, kernel[:, :, :, None], groups=B * C).view(B, C, H, W)  # down


if __name__ == "__main__":
    from common import chapters

    chapters.crops()  # prints a few facts and draws crops.png
