"""Several data sets for fine-tuning, mixed by weight: the order of pretraining blends, over samples that end.

    weights 2 : 1      which   a a b a a b a a b ...      the part that lags its weight most gives the next sample
    a of 4, b of 2     sample  2 0 1 3 1 0 0 3 1 ...      each part epoch after epoch, every epoch in an order of its own

Everything follows from the lengths, the weights and a seed: sample i is found without those before it, and a longer run
begins as a shorter one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mindspeed_data.batches import Stream
from mindspeed_data.pretrain import BlendedSamples, Samples, interleave, normal


def blend(
    parts: Sequence[Samples], weights: Sequence[float], samples: int | None, *, seed: int, shuffle: bool = True
) -> BlendedSamples:
    """Return so many samples of several data sets in the order of their weights; None: as many as show each whole."""
    shares = normal(weights)
    if samples is None:
        samples = max(math.ceil(len(part) / share) for part, share in zip(parts, shares, strict=True))
    arrays = interleave(shares, samples)
    which, sample = arrays["which"], arrays["sample"]
    for number, part in enumerate(parts):
        given = which == number  # the draws of a part are numbered from 0, and go on behind its end
        stream = Stream(len(part), seed + number, shuffle=shuffle)
        count = int(given.sum())
        sample[given] = stream.take(0, count) if count else 0
    return BlendedSamples(parts, which, sample)
