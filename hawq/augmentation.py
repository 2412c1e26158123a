"""Disturbed images among those to calibrate on: few images of one kind say too little of the inputs to come.

Rounding and bias correction fit the network to its calibration data; what generalises is the part of the fit that holds for
other brightness, contrast and colours as well. No label is needed: the float network says what each copy should give.
"""

from collections.abc import Sequence

import torch

_EVERY = 4  # images, of which one is disturbed: more help on photographs of other kinds, and cost on those of this kind
_CONTRAST = (0.3, 1.5)
_SHIFT = 0.35  # of the range of a channel's values, either way
_NEGATIVE = 0.3  # share of images with their colours inverted
_NOISE = 0.4  # the part of a copy that is noise
_NOISE_SPREAD = 0.2  # standard deviation of the noise, of its means and of its channels' mixture, relative to the range


def augmented(batches: Sequence[torch.Tensor], generator: torch.Generator | None = None) -> list[torch.Tensor]:
    """The batches with every fourth image replaced by a disturbed copy, where they are colour images (N, 3, height, width);
    as they are otherwise.

    A copy is mirrored along either axis or not, its channels are shuffled or not, its colours inverted or not, its contrast
    and each channel's brightness changed, and noise with the spectrum of natural images (1/f, Field 1987) is mixed in; values
    stay within the range that their channel has in the batch.
    """
    if not all(batch.dim() == 4 and batch.shape[1] == 3 and batch.is_floating_point() for batch in batches):
        return list(batches)
    result, before = [], 0
    for batch in batches:
        low, high = batch.amin((0, 2, 3), keepdim=True), batch.amax((0, 2, 3), keepdim=True)
        chosen = slice(_EVERY - 1 - before % _EVERY, None, _EVERY)
        changed = batch.clone()
        if len(batch[chosen]):
            changed[chosen] = _disturbed(batch[chosen], low, high, generator)
        result.append(changed)
        before += len(batch)
    return result


def _disturbed(batch: torch.Tensor, low: torch.Tensor, high: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    count = len(batch)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator).to(batch)

    mirrored = torch.where(draw(1, 1, 1) < 0.5, batch.flip(2), batch)
    mirrored = torch.where(draw(1, 1, 1) < 0.5, mirrored.flip(3), mirrored)
    order = torch.where(draw(1) < 0.5, draw(3).argsort(1), torch.arange(3))
    shuffled = mirrored.gather(1, order[:, :, None, None].expand_as(mirrored))
    turned = torch.where(draw(1, 1, 1) < _NEGATIVE, low + high - shuffled, shuffled)
    mean = turned.mean((2, 3), keepdim=True)
    contrast = _CONTRAST[0] + (_CONTRAST[1] - _CONTRAST[0]) * draw(1, 1, 1)
    shift = (2 * draw(3, 1, 1) - 1) * _SHIFT * (high - low)
    copy = torch.minimum(torch.maximum((turned - mean) * contrast + mean + shift, low), high)
    return (1 - _NOISE) * copy + _NOISE * _natural_noise(batch, low, high, generator)


def _natural_noise(
    like: torch.Tensor, low: torch.Tensor, high: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Noise images of that shape whose amplitudes fall with the spatial frequency, in colours drawn for each."""
    count, channels, height, width = like.shape
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = frequency.flatten()[1:].min() if frequency.numel() > 1 else 1.0
    amplitude = torch.randn(count, channels, *frequency.shape, 2, generator=generator)
    image = torch.fft.irfft2(torch.view_as_complex(amplitude) / frequency, s=(height, width))
    image = image / image.std((2, 3), keepdim=True).clamp(min=torch.finfo(image.dtype).tiny)
    mixture = torch.eye(channels) + 0.5 * torch.randn(count, channels, channels, generator=generator)
    mean = torch.randn(count, channels, 1, 1, generator=generator)
    noise = (torch.einsum("ncd,ndhw->nchw", mixture, image) + mean).to(like)
    return torch.minimum(torch.maximum((low + high) / 2 + _NOISE_SPREAD * (high - low) * noise, low), high)
