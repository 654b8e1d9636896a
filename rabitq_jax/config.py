"""RaBitQConfig: every choice of the algorithm, static and hashable, so that a jitted function can close over it."""

import dataclasses
import numbers
import typing
from typing import Literal

TopPScope = Literal["all", "scored"]
SelectionRule = Literal["plain", "debiased", "certified"]
Tail = Literal["drop", "mean"]
RotationKind = Literal["haar", "hadamard", "none"]
KeyCentroid = Literal["block", "prompt", "none"]
QueryCentroid = Literal["none", "prompt"]
QueryRounding = Literal["random", "nearest"]
ScoreImplementation = Literal["xla", "popcount", "int4", "triton"]
KernelImplementation = Literal["xla", "pallas"]
SelectImplementation = Literal["xla", "pallas", "mosaic"]
AttendImplementation = Literal["xla", "pallas", "mosaic"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaBitQConfig:
    """What to keep of the attention, and how it is estimated.

    Attributes:
      top_p: share of the attention mass to keep, in (0, 1]. 1 keeps every token and equals dense attention.
      top_p_scope: what the share is a share of. "all": scored and exact tokens together; "scored": the scored tokens
        alone, as in the paper's accuracy code.
      selection: how p is held (docs/theory.md). "plain": p of the estimated attention, as in the paper; noise makes the
        true share smaller. "debiased": p of the true attention on average. "certified": p of the true attention in each
        query head and step, but for a share `failure_rate` of them, at the price of more tokens. The last two also
        verify what was captured, and report it.
      failure_rate: of "certified", in (0, 0.5); and of the lower bound on the captured share that is reported.
      tail: what stands for the attention that is left out. "drop": nothing, the kept weights are scaled up; "mean": the
        mean value of the scored tokens, with the mass that was verified to be missing. It needs a selection that
        verifies.
      sink: number of first tokens that are always attended.
      recent: smallest number of last tokens that are always attended, and not yet quantized.
      interval: tokens quantized in one go when the unquantized tail reaches `recent + interval`; also the length of the
        block that shares a centroid when `key_centroid` is "block".
      dense_layers: number of first layers that attend densely. Top-p keeps many tokens where attention is flat.
      rotation: "haar" (QR of a Gaussian matrix) or "hadamard" (random signs times Walsh-Hadamard, three rounds); "none"
        takes keys as they are, to measure what rotating is worth: the estimate is then biased.
      rotation_seed: seed of every layer's rotation.
      key_centroid: c_k of equation (1): mean key of the token's own quantization block, or of the prompt; "none" is
        zero, to measure what centring is worth.
      query_centroid: c_q of equation (1): zero, or the mean of the prompt's queries of a kv head (one more stored
        number a token).
      query_rounding: "random" (unbiased, needs a PRNG key in every decode step) or "nearest".
      scores, select, attend, quantize: implementation of each stage; None is the kernel on a GPU, XLA elsewhere.
        select "mosaic" makes the scores too, so that `scores` must be None; it and attend "mosaic" need a Hopper GPU
        and JAX 0.11.

    Raises:
      ValueError: a value is outside its range, or two contradict each other.
    """

    top_p: float = 0.95
    top_p_scope: TopPScope = "all"
    selection: SelectionRule = "plain"
    failure_rate: float = 1e-3
    tail: Tail = "drop"
    sink: int = 16
    recent: int = 64
    interval: int = 128
    dense_layers: int = 0
    rotation: RotationKind = "haar"
    rotation_seed: int = 0
    key_centroid: KeyCentroid = "block"
    query_centroid: QueryCentroid = "none"
    query_rounding: QueryRounding = "random"
    scores: ScoreImplementation | None = None
    select: SelectImplementation | None = None
    attend: AttendImplementation | None = None
    quantize: KernelImplementation | None = None

    def __post_init__(self):
        if not isinstance(self.top_p, numbers.Real) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not isinstance(self.failure_rate, numbers.Real) or not 0 < self.failure_rate < 0.5:
            raise ValueError(f"failure_rate must be in (0, 0.5), got {self.failure_rate!r}")
        for name, lowest in (("sink", 0), ("recent", 1), ("interval", 1), ("dense_layers", 0), ("rotation_seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
        hints = typing.get_type_hints(type(self))
        rules = ("top_p_scope", "selection", "tail")
        for name in (*rules, "rotation", "key_centroid", "query_centroid", "query_rounding"):
            _check_choice(name, getattr(self, name), typing.get_args(hints[name]))
        for name in ("scores", "select", "attend", "quantize"):
            literal = typing.get_args(hints[name])[0]
            _check_choice(name, getattr(self, name), (None, *typing.get_args(literal)))

        if self.select == "mosaic" and self.scores is not None:
            raise ValueError(f"select 'mosaic' makes the scores itself: scores must be None, got {self.scores!r}")
        if self.selection == "plain" and self.tail == "mean":
            raise ValueError("selection must be 'debiased' or 'certified' for tail 'mean', got 'plain'")
        if self.selection != "plain" and self.rotation == "none":
            raise ValueError(f"rotation must be random for selection {self.selection!r}, got 'none'")
        if self.selection == "certified" and self.top_p_scope != "all":
            raise ValueError(f"top_p_scope must be 'all' for selection 'certified', got {self.top_p_scope!r}")

    @property
    def window(self) -> int:
        """Largest number of unquantized tokens that a decode step can meet."""
        return self.recent + self.interval

    def quantized_length(self, length):
        """Tokens that have codes once the lazy update has run at `length` tokens (an int or an int32 array)."""
        blocks = (length - self.recent) // self.interval
        return blocks * (blocks > 0) * self.interval


def _check_choice(name: str, value, choices: tuple):
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
