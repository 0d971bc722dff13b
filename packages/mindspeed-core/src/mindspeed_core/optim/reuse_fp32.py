"""A bf16 weight and 16 more bits are its fp32 master: nothing is kept twice.

The high half of an fp32 number is a bf16 number, its low half is the residual:

    master      s eeeeeeee mmmmmmm | llllllllllllllll        4 bytes
    weight      s eeeeeeee mmmmmmm                           2 bytes, the high half rounded by the low one
    residual                         llllllllllllllll        2 bytes, the low half as it is

Rounding adds 1 to the high half or does not, and from the residual one sees which, but for one case. Half a unit rounds

    away from zero ("half_away")    always up, so the residual tells: 16 + 16 bits hold every master
    to even ("nearest_even")        up after an odd high half and down after an even one, where the two meet at the same
                                    weight and residual: one more bit is needed, the `tie`

`nearest_even` is what every cast to bf16 does, so a run is the run with separate masters, bit for bit. In it a NaN stays
a NaN in the weight, and the tie says which of its bits was set for that. In `half_away` a NaN comes back as it was too,
but one with a payload that arithmetic does not make may look like an infinity or zero in the weight.
"""

from __future__ import annotations

import sys
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest_even", "half_away"]

MANTISSA, QUIET = 0x7F, 0x40  # of a bf16 number; the quiet bit is the mantissa's first
HALF, UNIT = 0x8000, 0x10000  # half a unit of a weight, and a unit, in units of the master
LOW = 0 if sys.byteorder == "little" else 1  # which 16 bits of an fp32 number are its low ones


def split(master: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the bf16 weight, the int16 residual and, with nearest_even, the tie (bool) of fp32 numbers [n]."""
    bits = master.view(torch.int32)
    residual = master.view(torch.int16)[LOW::2].contiguous()
    if rounding == "half_away":
        return ((bits + HALF) >> 16).to(torch.int16).view(torch.bfloat16), residual, None
    weight, tie = master.bfloat16(), bits & (2 * UNIT - 1) == HALF
    if master.sum().isnan():  # rare, and the only case that needs many steps
        high, nan = (bits >> 16).to(torch.int16), master.isnan()
        empty = nan & (high & MANTISSA == 0)  # its payload lies in the low half only
        kept = high | empty.to(torch.int16) * QUIET
        weight = torch.where(nan, kept.view(torch.bfloat16), weight)
        tie = torch.where(nan, empty, tie)
    return weight, residual, tie


def join(weight: Tensor, residual: Tensor, tie: Tensor | None) -> Tensor:
    """Return the fp32 numbers [n] that `split` made these of."""
    rounded = weight.view(torch.int16)
    # read with its sign, the residual is what rounding left over, but for a tie that was rounded down
    bits = (rounded.to(torch.int32) << 16) + residual
    if tie is not None:
        bits = bits.add(tie, alpha=UNIT)
        if weight.float().sum().isnan():
            high = (rounded & ~(tie.to(torch.int16) * QUIET)).to(torch.int32) << 16
            bits = torch.where(weight.isnan(), high | (residual.to(torch.int32) & (UNIT - 1)), bits)
    return bits.view(torch.float32)
