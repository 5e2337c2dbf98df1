"""`LogitMap`: what a family does with the product of hidden states and output weight.

Granite divides it, Gemma 2 caps it softly. Elementwise, so that it commutes with the split of the
vocabulary over ranks and with tiles.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitMap:
    """From a product x to the logit: `factor x`, or `sharpness cap tanh(factor x / cap)`."""

    factor: float = 1.0
    cap: float | None = None
    """None: only the factor."""

    sharpness: float = 1.0
    """After the cap; without one it is part of the factor."""

    def sharpened(self, sharpness: float) -> Self:
        """The map whose logits are multiplied by a number."""
        if self.cap is None:
            return replace(self, factor=self.factor * sharpness)
        return replace(self, sharpness=self.sharpness * sharpness)

    def __call__(self, products: Tensor) -> Tensor:
        """The logits, of any shape; differentiable."""
        if self.factor != 1.0:
            products = products * self.factor
        if self.cap is not None:
            products = torch.tanh(products / self.cap) * (self.cap * self.sharpness)
        return products

    def apply_(self, products: Tensor) -> None:
        """Replace products by logits, in place."""
        if self.cap is not None:
            products.mul_(self.factor / self.cap).tanh_().mul_(self.cap * self.sharpness)
        elif self.factor != 1.0:
            products.mul_(self.factor)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of the map where it gives these logits; without a cap it is constant."""
        if self.cap is None:
            return self.factor
        # d/dx of s c tanh(f x / c) is s f (1 − tanh²), with tanh = logit / (s c).
        tanh = logits / (self.cap * self.sharpness)
        # At least 0: a target that no rank owns has logit -inf.
        slope = tanh.square_().neg_().add_(1.0).clamp_(min=0.0)
        return slope.mul_(self.factor * self.sharpness)
