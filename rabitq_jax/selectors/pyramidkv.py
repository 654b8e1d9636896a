"""PyramidKV: SnapKV with a budget that falls from layer to layer (Cai et al., 2024, arXiv 2406.02069).

Of m layers whose mean budget is k, beside the W tokens of the observation window,

    k_(m-1) = k / beta,   k_0 = 2 k - k_(m-1),   k_l = k_0 - (k_0 - k_(m-1)) l / (m - 1)

because attention spreads over the whole context in the lowest layers, and gathers on few tokens in the highest.

The paper has beta = 20, a window of 8 queries, mean budgets of 64 to 2,048 tokens, and pools votes as SnapKV does.
Budgets are rounded down here, and are the same for every prompt: where k_0 is more than the prompt has, the paper's
code gives what is left over to the higher layers, which the static budgets of a ragged batch do not.
"""

import dataclasses

from rabitq_jax.selectors.selector import Selector
from rabitq_jax.selectors.snapkv import SnapKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV by layers.

    Attributes:
      budget: mean over the layers of the most prompt tokens that are attended, the observation window included.
      beta: mean budget over that of the last layer, at least 1.
    """

    observed: int = 8
    beta: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or self.beta < 1:
            raise ValueError(f"beta must be at least 1, got {self.beta!r}")

    def for_layer(self, layer: int, num_layers: int) -> Selector:
        if layer < self.dense_layers:
            return super().for_layer(layer, num_layers)
        return SnapKV(budget=self.layer_budget(layer, num_layers), observed=self.observed, kernel=self.kernel)

    def layer_budget(self, layer: int, num_layers: int) -> int:
        """The budget of a layer."""
        mean = self.budget - self.observed
        last = mean / self.beta
        first = 2 * mean - last
        fall = (first - last) * layer / (num_layers - 1) if num_layers > 1 else (first - last) / 2
        return self.observed + int(first - fall)
