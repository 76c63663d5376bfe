"""What a Mixer has learned, as pictures: token-mixing units and stem filters, as in the paper's figures 5 to 7.

A hidden unit of a token-mixing MLP reads all S tokens: its S input weights, laid out as the tokens lie, are a tile of
rows x cols. Low frequencies come first, and each unit stands beside its closest inverse. The paper sorts "by filter
frequency" without saying how: here it is the mean spatial frequency of a filter's power. Numpy alone, so that every
pixel can be told from the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np

from data_tools.errors import UserError
from pipeline.pictures import tile_grid

STEM = "stem.proj.weight"
IN_TRAINING = 3  # layers shown in the curves: those of figure 5
_TILE = 28  # pixels, about: the token grid is enlarged to it


def layer_name(layer: int) -> str:
    """The tensor [D_S, S] of token-mixing layer `layer`; the first is 1, as in the paper."""
    return f"blocks.{layer - 1}.mlp_tokens.fc1.weight"


def mean_frequency(filters: np.ndarray) -> np.ndarray:
    """[N, rows, cols] or [N, channels, rows, cols] -> [N]: cycles a token (or pixel), 0 of a constant to 0.71.

    The mean of sqrt(f_y^2 + f_x^2) over the 2-D Fourier transform, weighted with the power there. A filter of zeros
    has 0.
    """
    rows, cols = filters.shape[-2:]
    power = np.abs(np.fft.fft2(filters.astype(np.float64))) ** 2
    power = power.reshape(len(filters), -1, rows, cols).sum(1)
    radius = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(cols)[None, :])
    total = power.sum((1, 2))
    return (power * radius).sum((1, 2)) / np.where(total > 0, total, 1)


def inverse_pairs(units: np.ndarray) -> list[tuple[int, int, float]]:
    """Pairs (i, j, cosine), i < j, of units [N, S]: the two most opposite first, then of those that are left.

    Only the direction counts, as in the picture, where every unit has its own scale. Of an odd number one is left.
    """
    n = len(units)
    norm = np.linalg.norm(units, axis=1, keepdims=True).astype(np.float64)
    unit = units / np.where(norm > 0, norm, 1)
    first, second = np.triu_indices(n, 1)
    cosine = (unit @ unit.T)[first, second]
    free, pairs = np.ones(n, dtype=bool), []
    for at in np.argsort(cosine, kind="stable"):
        i, j = first[at], second[at]
        if free[i] and free[j]:
            free[i] = free[j] = False
            pairs.append((int(i), int(j), float(cosine[at])))
            if 2 * len(pairs) >= n - 1:
                break
    return pairs


def sort_units(units: np.ndarray, rows: int, cols: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The order in which units [N, rows * cols] are shown; every unit's frequency [N]; every pair's cosine.

    Pairs by their mean frequency, in each the unit of the lower one first; a unit without a partner comes last.
    """
    frequency = mean_frequency(units.reshape(-1, rows, cols))
    pairs = inverse_pairs(units)
    ordered = [(i, j) if frequency[i] <= frequency[j] else (j, i) for i, j, _ in pairs]
    ordered.sort(key=lambda pair: (frequency[pair[0]] + frequency[pair[1]], pair))
    order = [k for pair in ordered for k in pair]
    alone = [k for k in range(len(units)) if k not in set(order)] if len(order) < len(units) else []
    return [*order, *alone], frequency, np.array([cosine for *_, cosine in pairs])


def token_mixing_picture(units: np.ndarray, rows: int, cols: int, order: list[int]) -> np.ndarray:
    """Units [N, rows * cols] in `order` as grey tiles, partners side by side -> uint8 [., ., 3].

    Each on its own scale: 0 is middle grey, its largest magnitude black or white.
    """
    grey = _shades(units[order].reshape(-1, 1, rows, cols))
    factor = max(1, _TILE // max(rows, cols))
    return tile_grid(grey.repeat(factor, 1).repeat(factor, 2), _columns(len(units)))


def stem_picture(weight: np.ndarray) -> np.ndarray:
    """Stem filters [C, 1 or 3, P, P] in colour, low frequencies first, each on its own scale -> uint8 [., ., 3].

    Raises UserError for another number of channels: they are no colours.
    """
    if weight.shape[1] not in (1, 3):
        raise UserError(f"the stem's filters have {weight.shape[1]} channels; only 1 and 3 can be shown")
    order = np.argsort(mean_frequency(weight), kind="stable")
    factor = max(1, _TILE // weight.shape[2])
    return tile_grid(_shades(weight[order]).repeat(factor, 1).repeat(factor, 2), _columns(len(weight)))


def _shades(filters: np.ndarray) -> np.ndarray:
    """[N, channels, rows, cols] -> uint8 [N, rows, cols, 3]."""
    filters = np.broadcast_to(filters.astype(np.float64), (len(filters), 3, *filters.shape[2:]))
    scale = np.abs(filters).max((1, 2, 3), keepdims=True)
    shade = np.rint(127.5 + 127.5 * filters / np.where(scale > 0, scale, 1))
    return shade.astype(np.uint8).transpose(0, 2, 3, 1)


def _columns(tiles: int) -> int:
    """An even number, for a picture about half as wide again as it is high: 24 of the 384 units of a B/16."""
    return 2 * math.ceil(math.sqrt(1.5 * tiles) / 2)


def token_grid(tokens: int, given: str | None = None) -> tuple[int, int]:
    """(rows, cols) of S tokens: a square, unless `given` as "ROWSxCOLS". Raises UserError where they do not fit."""
    if given is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise UserError(f"{tokens} tokens are no square: say how they lie with --grid ROWSxCOLS")
        return side, side
    match = re.fullmatch(r"(\d+)x(\d+)", given)
    if match is None or int(match[1]) * int(match[2]) != tokens:
        raise UserError(f"--grid {given}: write ROWSxCOLS whose product is the number of tokens, {tokens}")
    return int(match[1]), int(match[2])


def parse_layers(text: str, layers: int) -> list[int]:
    """ "1-3,8" or "all" -> layers, the first being 1. Raises UserError for one that is not there."""
    if text == "all":
        return list(range(1, layers + 1))
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= layers:
            raise UserError(f"--layers {text}: write layers of 1 to {layers}, such as 1-3 or 1,{layers}, or all")
        chosen += range(first, last + 1)
    return list(dict.fromkeys(chosen))


def count_layers(names: Iterable[str], where: object) -> int:
    """Token-mixing layers among tensors' names. Raises UserError where there are none, or no stem."""
    names = set(names)
    layers = 0
    while layer_name(layers + 1) in names:
        layers += 1
    if not layers or STEM not in names:
        raise UserError(f"{where} is no Mixer: it has no {STEM if layers else layer_name(1)}")
    return layers


def training_pictures(names: Collection[str], read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the curves, uint8 [., ., 3]) of the stem and the first layers, of what there is and can be shown."""
    if STEM in names and (stem := read(STEM)).shape[1] in (1, 3):
        yield "weights/stem", stem_picture(stem)
    for layer in range(1, IN_TRAINING + 1):
        if layer_name(layer) in names:
            units = read(layer_name(layer))
            rows, cols = token_grid(units.shape[1])
            order, _, _ = sort_units(units, rows, cols)
            yield f"weights/token_mixing_{layer}", token_mixing_picture(units, rows, cols, order)
