# SPDX-License-Identifier: Apache-2.0
"""Steps that turn rotations. They stay orthogonal: a step multiplies by the exponential of a skew-symmetric matrix."""

import torch
from torch import Tensor

MOMENTUM, SCALE_DECAY = 0.9, 0.99
"""Of the means over past steps of the gradient and of its square, as Adam takes them."""


def turnable(rotation: Tensor) -> tuple[Tensor, Tensor]:
    """A turn of zero, and the rotation as a function of it; the gradient by the turn is what `stepped` takes."""
    turn = torch.zeros_like(rotation).requires_grad_()
    # The derivative at zero of the exponential that a step multiplies by.
    return turn, rotation + rotation @ (turn - turn.transpose(-1, -2))


def stepped(
    rotation: Tensor, gradient: Tensor, momentum: Tensor, scale: Tensor, steps: int, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The rotation after a step against the gradient, and the new momentum and scale.

    Args:
        rotation: [heads, head_dim, head_dim], as are gradient, momentum and scale, which begin at zero.
        steps: this one included. rate: about the angle of a step in each plane of two dimensions, in radians.
    """
    momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
    scale = SCALE_DECAY * scale + (1 - SCALE_DECAY) * gradient.square()
    mean = momentum / (1 - MOMENTUM**steps)
    size = (scale / (1 - SCALE_DECAY**steps)).sqrt() + 1e-12
    return rotation @ torch.matrix_exp(-rate * mean / size), momentum, scale


def orthogonal(rotation: Tensor) -> Tensor:
    """The same, without what rounding has added."""
    left, right = torch.linalg.qr(rotation.double())
    return (left * right.diagonal(dim1=-2, dim2=-1).sign()[:, None]).float()


def spread_along(rotation: Tensor, covariance: Tensor) -> Tensor:
    """Root of the variance of keys under attention along each dimension, [heads, head_dim]."""
    along = torch.einsum("hji,hjk,hki->hi", rotation, covariance, rotation)
    return along.detach().clamp_min(0).sqrt()
