"""A shoebox room's impulse response by image sources (Allen and Berkley 1979), for scenes with an echo."""

from itertools import product

import numpy as np

from runtime.audio import Wave

Point = tuple[float, float, float]

SPEED = 343.0  # m/s


def room(
    source: Point = (2.0, 1.5, 1.0),
    microphone: Point = (2.4, 1.5, 1.0),
    size: Point = (5.0, 4.0, 2.7),
    reflection: float = 0.85,
    seconds: float = 0.4,
    rate: int = 16000,
) -> Wave:
    """Impulse response from source to microphone (metres from a corner), its largest sample 1, the way there included.

    `reflection` is what a wall leaves of the pressure; 0.85 in a room of this size rings for about half a second.
    """
    reach = range(-int(seconds * SPEED / min(size)) // 2 - 1, int(seconds * SPEED / min(size)) // 2 + 2)
    orders = np.array(list(product(reach, repeat=3)))
    echo = np.zeros(round(seconds * rate))
    for mirrored in product((0, 1), repeat=3):
        flip = np.array(mirrored)
        images = (1 - 2 * flip) * source + 2 * orders * size
        distance = np.linalg.norm(images - microphone, axis=1)
        bounces = np.abs(orders - flip).sum(axis=1) + np.abs(orders).sum(axis=1)
        at = np.rint(distance / SPEED * rate).astype(int)
        near = at < len(echo)
        np.add.at(echo, at[near], (reflection**bounces / distance)[near])
    return (echo / np.abs(echo).max()).astype(np.float32)
