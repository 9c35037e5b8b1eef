"""Conversion of HDR and wide-gamut colors to 8-bit sRGB."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8, UInt16

Pixels = UInt8[np.ndarray, "frames height width 3"]
"""Red, green and blue of frames, in sRGB."""
BT2020, DISPLAY_P3 = 9, 12
"""Color primaries of a wide gamut (ITU-T H.273, table 2)."""
PQ, HLG = 16, 18
"""Transfer characteristics of HDR (H.273, table 3)."""
WHITE = 203.0
"""Luminance of reference white in HDR, in candelas per square meter (ITU-R BT.2408, table 1)."""
KNEE = 0.6
"""Share of reference white above which light is compressed, so that highlights keep their shape."""

_TO_BT709 = {
    BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    DISPLAY_P3: ((1.2249, -0.2249, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0983)),
}


class ColorCoding(NamedTuple):
    """Color coding, by the code points of H.273."""

    primaries: int = 2
    """Color primaries; 2 is unknown."""
    transfer: int = 2
    """Transfer characteristics, from levels to light; 2 is unknown."""

    @property
    def is_foreign(self) -> bool:
        """True if pixels have to be converted."""
        return self.transfer in (PQ, HLG) or self.primaries in _TO_BT709

    def or_else(self, other: ColorCoding) -> ColorCoding:
        """This coding, with unknown codes taken from another one."""
        return ColorCoding(*(theirs if own == 2 else own for own, theirs in zip(self, other, strict=True)))


UNKNOWN = ColorCoding()


def to_srgb(pixels: UInt16[np.ndarray, "height width 3"], coding: ColorCoding) -> UInt8[np.ndarray, "height width 3"]:
    """Pixels in sRGB; light brighter than its white is compressed, colors outside its gamut are clipped.

    Args:
        pixels: red, green and blue in full-range 16 bits.
        coding: color coding of the pixels; unknown primaries mean BT.2020 in HDR, transfers other than PQ and HLG sRGB.
    """
    primaries, transfer = coding
    light, is_hdr = _light(transfer)[pixels], transfer in (PQ, HLG)
    if transfer == HLG:  # the display's own transfer at 1,000 candelas (ITU-R BT.2100, table 5)
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= 1000 / WHITE * np.maximum(luminance, 1e-6)[..., None] ** 0.2
    matrix = _TO_BT709.get(BT2020 if is_hdr and primaries == 2 else primaries)
    if matrix is not None:
        light = light @ np.array(matrix, np.float32).T
    if is_hdr:
        brightest = np.maximum(light.max(-1, keepdims=True), KNEE)
        light *= (1 - (1 - KNEE) * np.exp((KNEE - brightest) / (1 - KNEE))) / brightest
    return _levels()[(light.clip(0, 1) * 65535).round().astype(np.uint16)]


@lru_cache
def _light(transfer: int) -> Float32[np.ndarray, " levels"]:
    """Linear light by level; 1 is white, or in HLG the peak."""
    level = np.arange(2**16) / (2**16 - 1)
    if transfer == PQ:  # BT.2100, table 4
        power = level ** (32 / 2523)
        light = 10_000 / WHITE * (np.maximum(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)) ** (8192 / 1305)
    elif transfer == HLG:  # BT.2100, table 5
        light = np.where(level <= 0.5, level**2 / 3, (np.exp((level - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    else:  # IEC 61966-2-1
        light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@lru_cache
def _levels() -> UInt8[np.ndarray, " lights"]:
    """Levels of sRGB by linear light in 16 bits."""
    light = np.arange(2**16) / (2**16 - 1)
    level = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return (level * 255).round().astype(np.uint8)
