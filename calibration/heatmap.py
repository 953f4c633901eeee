"""An anomaly map as a person sees it: one fixed colour scale, so that a good part is never red."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.frame import Pixels, gray, reflectance

FULL_SCALE = 2.0  # map / map_threshold at the top of the colour scale

# Gray level of `levels`, red, green, blue, opacity. The step at 128 is the threshold: nothing below is orange or red.
# Lightness falls from yellow to dark red, so the order survives red-green blindness and a black-and-white printer.
STOPS = (
    (0, 255, 236, 110, 0.00),
    (64, 255, 236, 110, 0.00),
    (127, 255, 222, 0, 0.50),
    (128, 255, 176, 0, 0.58),
    (176, 244, 90, 0, 0.70),
    (216, 214, 20, 20, 0.78),
    (255, 150, 0, 38, 0.84),
)


def levels(anomaly_map: NDArray[np.float32], map_threshold: float) -> NDArray[np.uint8]:
    """Return the map as gray levels: 0 at zero, 127 at the threshold, 255 at twice the threshold and above.

    anomaly_map: (h, w), in the recipe's own units. map_threshold: same units, above 0.
    """
    scaled = np.clip(anomaly_map / (FULL_SCALE * map_threshold), 0.0, 1.0)
    return np.asarray(np.floor(scaled * 255.0), dtype=np.uint8)


def overlay(pixels: Pixels, anomaly_map: NDArray[np.float32], map_threshold: float) -> NDArray[np.uint8]:
    """Return the part in gray with its map over it: clear below half the threshold, yellow up to it, red above.

    pixels: (H, W) or (H, W, 3), in the view of the map; uint16 up to 65535, convert other depths with `reflectance`.
    Result: (H, W, 3) RGB.
    """
    enlarged = cv2.resize(anomaly_map, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    shade = levels(np.asarray(enlarged, dtype=np.float32), map_threshold)
    lightness = np.clip(reflectance(gray(pixels), 8 if pixels.dtype == np.uint8 else 16), 0.0, 1.0) * np.float32(255.0)
    return _blend(lightness, shade)


def scale_bar(width: int, height: int) -> NDArray[np.uint8]:
    """Return the legend of the overlay, zero at the left and twice the threshold at the right, over a mid gray.

    Result: (height, width, 3) RGB.
    """
    shade = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8), (height, width))
    return _blend(np.full((height, width), 150.0, dtype=np.float32), shade)


def _blend(lightness: NDArray[np.float32], shade: NDArray[np.uint8]) -> NDArray[np.uint8]:
    opacity = OPACITY[shade][:, :, None]  # (H, W, 1)
    return np.asarray(np.rint(lightness[:, :, None] * (1 - opacity) + COLOURS[shade] * opacity), dtype=np.uint8)


def _scale() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return colours (256, 3) and opacities (256,) for the gray levels of `levels`."""
    places, *channels = np.array(STOPS, dtype=np.float32).T
    red, green, blue, opacity = (np.interp(np.arange(256), places, channel) for channel in channels)
    return np.stack([red, green, blue], axis=1).astype(np.float32), opacity.astype(np.float32)


COLOURS, OPACITY = _scale()
