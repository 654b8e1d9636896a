"""What a retrieval method is: a frozen configuration, and pure functions of a state that lives in the cache.

A method makes a layer's state (`init`), watches the prompt go by (`observe`, once a chunk), finishes the state when all
of the prompt is in the cache (`build`), and in every decode step takes in the new token (`update`) and attends
(`attend`). Most methods only choose tokens (`choose`) and leave attending to the gathered attention that all share;
most of those only score tokens, and leave choosing to a budget rule (`ScoringSelector`).

The exact keys and values of all tokens stay in the cache whatever a method does, so that every method is compared on
the same cache; what a method would have evicted is simply not read again.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp

from rabitq_jax.exact_logsumexp import exact_logsumexp
from rabitq_jax.gathered_attention import gathered_attention
from rabitq_jax.selectors.budget import Rule, TopK, make_rule
from rabitq_jax.token_list import list_tokens
from rabitq_jax.top_p import Selection

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache

# A method's state: any pytree of arrays, those with a batch axis having it first; None for a method without state.
State = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Static sizes of the layer's cache that a state is made for."""

    batch: int
    capacity: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: Any

    @property
    def tokens(self) -> tuple[int, int, int]:
        """B, K, T."""
        return self.batch, self.num_kv_heads, self.capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What a decode step knows beside its queries and the cache.

    Attributes:
      softmax_scale: factor from <q, k> to a logit.
      new_tokens: int32 [B], 1 where the sequence has taken a token in, 0 where it has ended.
      previous: the state, after this step, of the nearest layer below that keeps one; None where none does.
    """

    softmax_scale: float
    new_tokens: jax.Array
    previous: State = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Tokens to attend, the bytes that choosing them read (float32 [B]), and the state after it."""

    selection: Selection
    bytes_read: jax.Array
    state: State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attended:
    """A decode step's output float32 [B,K,G,D], the tokens attended, all bytes read (float32 [B]), and the state."""

    out: jax.Array
    selection: Selection
    bytes_read: jax.Array
    state: State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector:
    """A retrieval method; attributes of subclasses are its static configuration.

    Attributes:
      dense_layers: number of first layers that attend densely.
    """

    dense_layers: int = 0

    # What `from_arguments` takes beside fields.
    _more_arguments: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        check_at_least("dense_layers", self.dense_layers, 0)

    @classmethod
    def from_arguments(cls, **arguments) -> Self:
        """A selector from arguments as they come from a command line.

        Raises:
          ValueError: an argument is none of this method's, or its value is wrong.
        """
        check_names(cls, arguments, cls._more_arguments)
        return cls(**arguments)

    @property
    def block(self) -> int:
        """The cache's capacity must be a multiple of so many tokens."""
        return 1

    @property
    def observes(self) -> bool:
        """`observe` matters: the method learns from the prompt's queries, not from its keys and values alone."""
        return False

    def for_layer(self, layer: int, num_layers: int) -> "Selector":
        """What this method is in one of a model's layers."""
        # full.py builds on this module.
        from rabitq_jax.selectors.full import FullAttention

        del num_layers
        return FullAttention() if layer < self.dense_layers else self

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        """Bytes that choosing reads of each cached token of a kv head, in all steps alike; keys of `itemsize` a number.

        Keys and values of the tokens that are then attended come on top.
        """
        raise NotImplementedError

    def init(self, shape: CacheShape) -> State:
        """The state of an empty cache."""
        del shape
        return None

    def observe(self, state: State, cache: "LayerCache", query: jax.Array, new_tokens: jax.Array) -> State:
        """A chunk of a prompt has been appended.

        Args:
          query: [B,N,H,D], the chunk's queries; the first new_tokens[b] (int32 [B]) of sequence b are real.
        """
        del cache, query, new_tokens
        return state

    def build(self, state: State, cache: "LayerCache") -> State:
        """A prompt is in the cache whole. Later prompts come here again, with all that is in the cache then."""
        del cache
        return state

    def update(self, state: State, cache: "LayerCache", step: Step) -> State:
        """A token has been appended to every sequence that goes on."""
        del cache, step
        return state

    def choose(self, query: jax.Array, state: State, cache: "LayerCache", step: Step) -> Choice:
        """The tokens that each kv head attends, for queries [B,K,G,D]; the cache and state hold the new token."""
        raise NotImplementedError

    def attend(self, query: jax.Array, state: State, cache: "LayerCache", step: Step) -> Attended:
        """Attention of queries [B,K,G,D] to what the method chooses."""
        with jax.named_scope("select_tokens"):
            choice = self.choose(query, state, cache, step)
        selection = choice.selection
        with jax.named_scope("gathered_attention"):
            out = gathered_attention(
                query, cache.keys, cache.values, selection.indices, selection.counts, softmax_scale=step.softmax_scale
            )
        bytes_read = choice.bytes_read + attended_bytes(selection, cache)
        return Attended(out=out, selection=selection, bytes_read=bytes_read, state=choice.state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringSelector(Selector):
    """A method that gives every token, or page of tokens, a score for each query head.

    Attributes:
      rule: the budget: what is kept of scores. On a command line, budget=1024, top_p=0.9, or both.
      sink: number of first tokens that are always attended.
      recent: smallest number of last tokens that are always attended, the new one among them.
      page: tokens that share a score; fixed in a method without pages.
    """

    rule: Rule = TopK(budget=1024)
    sink: int = 0
    recent: int = 1
    page: int = dataclasses.field(default=1, init=False)

    _more_arguments: ClassVar[tuple[str, ...]] = ("budget", "top_p")

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.rule, Rule):
            raise ValueError(f"rule must be a budget rule such as TopK(budget=1024), got {self.rule!r}")
        check_at_least("sink", self.sink, 0)
        check_at_least("recent", self.recent, 1)

    @classmethod
    def from_arguments(cls, *, budget: int | None = None, top_p: float | None = None, **arguments) -> Self:
        if budget is not None or top_p is not None:
            arguments["rule"] = make_rule(budget, top_p)
        return super().from_arguments(**arguments)

    @property
    def block(self) -> int:
        return self.page

    @property
    def window(self) -> int:
        """Largest number of last tokens that are attended without a score."""
        return self.recent + self.page - 1

    def scored_length(self, cache: "LayerCache") -> jax.Array:
        """int32 [B]: tokens [sink, scored_length) have scores; the rest is attended in any case."""
        return jnp.maximum(cache.length - self.recent, 0) // self.page * self.page

    def score(self, query: jax.Array, state: State, cache: "LayerCache", step: Step) -> jax.Array:
        """float32 [B,K,G,T / page], estimated scaled logits; anything where there is no token to score."""
        raise NotImplementedError

    def choose(self, query: jax.Array, state: State, cache: "LayerCache", step: Step) -> Choice:
        scores = self.score(query, state, cache, step)
        selection = self.select(scores, query, cache, step)
        return Choice(selection=selection, bytes_read=self.scoring_bytes(cache), state=state)

    def select(self, scores: jax.Array, query: jax.Array, cache: "LayerCache", step: Step) -> Selection:
        """What the budget rule keeps of scores float32 [B,K,G,T / page]."""
        stop = self.scored_length(cache)
        exact_lse = None
        if self.rule.uses_mass:
            exact_lse = exact_logsumexp(
                query, cache.keys, stop, cache.length,
                sink=self.sink, window=self.window, softmax_scale=step.softmax_scale,
            )  # fmt: skip
        return self.rule.select(
            scores, exact_lse, stop, cache.length, sink=self.sink, window=self.window, page=self.page
        )

    def scoring_bytes(self, cache: "LayerCache") -> jax.Array:
        """float32 [B]: what scoring reads, and for rules of mass the keys that are attended in any case."""
        kv_heads, _, head_dim = cache.keys.shape[1:]
        itemsize = cache.keys.dtype.itemsize
        scored = jnp.maximum(self.scored_length(cache) - self.sink, 0)
        bytes_read = self.bytes_per_token(head_dim, itemsize) * scored.astype(jnp.float32)
        if self.rule.uses_mass:
            bytes_read += head_dim * itemsize * (cache.length - scored).astype(jnp.float32)
        return kv_heads * bytes_read


def attended_bytes(selection: Selection, cache: "LayerCache") -> jax.Array:
    """float32 [B], keys and values of the tokens that are attended."""
    row = cache.keys.shape[3] * cache.keys.dtype.itemsize
    return 2 * row * jnp.sum(selection.counts.astype(jnp.float32), axis=1)


def everything(query: jax.Array, cache: "LayerCache") -> Selection:
    """The selection of all tokens, for queries [B,K,G,D]."""
    return selected(jnp.ones(cache.keys.shape[:3], bool), query, cache, mass=1.0)


def selected(mask: jax.Array, query: jax.Array, cache: "LayerCache", *, mass: float = jnp.nan) -> Selection:
    """The selection of a mask, bool [B,K,T], for queries [B,K,G,D].

    Args:
      mass: share of the attention in it; NaN for a method that estimates none.
    """
    indices, counts = list_tokens(mask, cache.length)
    return Selection(
        indices=indices,
        counts=counts,
        scored=jnp.broadcast_to(counts[..., None], query.shape[:3]),
        mass=jnp.full(query.shape[:3], mass, jnp.float32),
    )


def mask_of(selection: Selection) -> jax.Array:
    """bool [B,K,T], the tokens of a selection."""
    batch, kv_heads, tokens = selection.indices.shape
    index = jnp.where(jnp.arange(tokens) < selection.counts[..., None], selection.indices, tokens)
    rows = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]
    return jnp.zeros(selection.indices.shape, bool).at[*rows, index].set(True, mode="drop")


def newest(array: jax.Array, cache: "LayerCache") -> jax.Array:
    """[B,K,...], the row of the token that was appended last, of an array [B,K,T,...]."""
    sequence = jnp.arange(array.shape[0])
    return array[sequence, :, cache.length - 1]


def set_newest(array: jax.Array, row: jax.Array, cache: "LayerCache") -> jax.Array:
    """An array [B,K,T,...] with the row [B,K,...] of the token that was appended last."""
    sequence = jnp.arange(array.shape[0])
    return array.at[sequence, :, cache.length - 1].set(row.astype(array.dtype))


def check_names(cls: type, arguments: dict[str, Any], more: tuple[str, ...] = ()):
    """Raise ValueError for arguments that are neither fields of a dataclass nor in `more`."""
    # The layer is not chosen: `for_layer` sets it.
    names = {field.name for field in dataclasses.fields(cls) if field.init and field.name != "layer"}.union(more)
    for name in arguments:
        if name not in names:
            raise ValueError(f"{cls.__name__} has no argument {name!r}: it takes {', '.join(sorted(names))}")


def check_at_least(name: str, value: Any, lowest: int):
    """Raise ValueError for what is no integer of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")


def check_multiple(name: str, value: Any, unit: int):
    """Raise ValueError for what is no positive multiple of `unit`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < unit or value % unit:
        raise ValueError(f"{name} must be a positive multiple of {unit}, got {value!r}")
