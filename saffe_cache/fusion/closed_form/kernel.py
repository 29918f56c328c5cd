"""Kernel ridge regression in both directions; the two cosines are averaged.

Source: kernel ridge regression (Saunders et al. 1998) in place of the linear one of `ridge`. Inputs and targets are
unit vectors without their mean: x of photos' summaries, t of texts; a pair's text is the mean of its photo's captions.
With pairs as anchors, c of them,

    K(x, y) = exp(-gamma |x - y|^2 / v),   v = mean |x|^2,   k(x) = (K(x, x_1), ..., K(x, x_c))

    photo to text    f(x) = k(x) W     least squares over all pairs with penalty lambda; with all pairs as anchors,
                                       W = (K + lambda I)^-1 T
    text to photo    g(t), the same the other way, of the photos' 256 principal axes V

    cos(x, t) = 1/2 cos(f(x), t) + 1/2 cos(x V, g(t))

Of each direction, validation chooses lambda with gamma = 0.4, then gamma. Up to 2,000 pairs are all anchors; of more,
as many are drawn, and all are regressed on (subset of regressors, Smola & Schoelkopf 2000). So size and time are
bounded. Far from all anchors a prediction is the mean of the training pairs.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch.nn import functional

from saffe_cache.fusion.base import Blocks, TrainingVectors
from saffe_cache.fusion.closed_form.fitting import ClosedForm, in_both_spaces
from saffe_cache.fusion.closed_form.moments import Side, unit
from saffe_cache.fusion.options import FusionShape

MOST_ANCHORS = 2_000
MOST_AXES = 256
FIRST_WIDTH, OTHER_WIDTHS = 0.4, (0.1, 0.2, 0.8)
"""gamma: the kernel of two inputs is about exp(-2 gamma)."""
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""lambda; the kernel of an input with itself is 1."""
_JITTER = 1e-8
"""Added to the diagonal of the anchors' kernel, which is singular where inputs are equal."""


def gaussian_kernel(left: torch.Tensor, right: torch.Tensor, width: torch.Tensor | float) -> torch.Tensor:
    """exp(-width |x - y|^2 / d) of rows [n, d] and [m, d]: [n, m]."""
    squares = left.square().sum(dim=1)[:, None] + right.square().sum(dim=1) - 2 * left @ right.T
    return torch.exp(-width * squares.clamp(min=0) / left.shape[1])


class KernelRegression:
    """From inputs [n, d] to targets [n, out], with anchors [c, d] among the inputs; float64.

    With K = kernel of the anchors = L L' and F = kernel of inputs and anchors times L'^-1, the weights are
    L'^-1 (F' F + lambda I)^-1 F' Y.
    """

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, anchors: np.ndarray, width: float) -> None:
        rows, fixed = torch.from_numpy(inputs), torch.from_numpy(anchors)
        kernel = gaussian_kernel(fixed, fixed, width)
        kernel.diagonal().add_(_JITTER)
        self._factor = torch.linalg.cholesky(kernel)
        features = torch.linalg.solve_triangular(self._factor, gaussian_kernel(fixed, rows, width), upper=False)
        self._squares, self._shared = features @ features.T, features @ torch.from_numpy(targets)

    def weights(self, strength: float) -> np.ndarray:
        """W for a lambda, [c, out]."""
        penalised = self._squares.clone()
        penalised.diagonal().add_(strength)
        fitted = torch.cholesky_solve(self._shared, torch.linalg.cholesky(penalised))
        return np.asarray(torch.linalg.solve_triangular(self._factor.T, fitted, upper=True))


class KernelRidgeFusion(ClosedForm):
    """c (s + 2 k + r) + s (r + 1) + k + 6 parameters: c anchors, summaries of width s, texts of width k, r axes."""

    photo_mean: torch.Tensor
    photo_anchors: torch.Tensor
    to_text: torch.Tensor
    axes: torch.Tensor
    text_mean: torch.Tensor
    scales: torch.Tensor
    text_anchors: torch.Tensor
    to_photo: torch.Tensor
    widths: torch.Tensor
    shares: torch.Tensor

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        photo, text = shape.summary_size, shape.text_size
        self.register_buffer("photo_mean", torch.zeros(photo))
        self.register_buffer("photo_anchors", torch.zeros(1, photo))
        self.register_buffer("to_text", torch.zeros(1, text))
        self.register_buffer("axes", torch.zeros(photo, 1))
        self.register_buffer("text_mean", torch.zeros(text))
        self.register_buffer("scales", torch.ones(2))
        self.register_buffer("text_anchors", torch.zeros(1, text))
        self.register_buffer("to_photo", torch.zeros(1, 1))
        self.register_buffer("widths", torch.full((2,), FIRST_WIDTH))  # of photos' kernel, of texts'
        self.register_buffer("shares", torch.ones(2))

    def fit(self, seen: TrainingVectors) -> None:
        photos, texts = unit(seen.photos), seen.mean_texts.astype(np.float64)
        photo_mean, text_mean = photos.mean(axis=0), texts.mean(axis=0)
        scales = _scale(photos - photo_mean), _scale(seen.texts - text_mean)
        photos, texts = (photos - photo_mean) / scales[0], (texts - text_mean) / scales[1]
        drawn = np.sort(np.random.default_rng(0).permutation(len(photos))[:MOST_ANCHORS])
        axes = np.ascontiguousarray(Side.of(photos, np.ones(len(photos))).axes[:, :MOST_AXES])
        self.set({"photo_mean": photo_mean, "text_mean": text_mean, "scales": np.array(scales), "axes": axes})
        self.set({"photo_anchors": photos[drawn], "text_anchors": texts[drawn]})
        self.set({"to_text": np.zeros_like(texts[drawn]), "to_photo": np.zeros((len(drawn), axes.shape[1]))})
        self._choose_direction("to_text", 0, photos, texts, drawn, seen)
        self._choose_direction("to_photo", 1, texts, photos @ axes, drawn, seen)
        self.set({"shares": np.ones(2)})

    def _choose_direction(
        self, name: str, number: int, inputs: np.ndarray, targets: np.ndarray, drawn: np.ndarray, seen: TrainingVectors
    ) -> None:
        """lambda, then gamma, of one direction, compared by itself."""
        widths = self.widths.numpy(force=True)

        def regression(width: float) -> KernelRegression:
            widths[number] = width
            return KernelRegression(inputs, targets, inputs[drawn], width)

        self.set({"shares": np.eye(2)[number]})
        of_first = regression(FIRST_WIDTH)
        candidates = {strength: of_first.weights(strength) for strength in STRENGTHS}
        best = self.choose(({name: weights, "widths": widths.copy()} for weights in candidates.values()), seen)
        chosen = next(strength for strength, weights in candidates.items() if weights is best[name])
        others = ({name: regression(width).weights(chosen), "widths": widths.copy()} for width in OTHER_WIDTHS)
        self.choose(itertools.chain([best], others), seen)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        photo = (functional.normalize(summary, dim=-1) - self.photo_mean) / self.scales[0]
        in_text = gaussian_kernel(photo, self.photo_anchors, self.widths[0]) @ self.to_text
        return in_both_spaces(self.shares, in_text, photo @ self.axes)

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        text = (unit - self.text_mean) / self.scales[1]
        in_photo = gaussian_kernel(text, self.text_anchors, self.widths[1]) @ self.to_photo
        return in_both_spaces(self.shares, text, in_photo)


def _scale(centred: np.ndarray) -> float:
    """By which the mean squared length of rows [n, d] becomes d; 1 if all are zero."""
    return float(np.sqrt(np.square(centred, dtype=np.float64).mean())) or 1.0
