"""The jitted programs of generation: a prefill chunk, and a loop of decode steps. They reuse the cache they get."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from rabitq_jax import attention
from rabitq_jax.cache import Cache, LoopCache
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.sampling import Sampling, sample
from rabitq_jax.selectors import Selector

# What becomes of a layer's query heads in the stats of a step.
VERIFIED = {"verified": jnp.mean, "bound": jnp.min, "extended": jnp.mean, "certified": jnp.mean}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepStats:
    """What decode steps attended and read. N steps, L layers; zero in steps after a sequence's end.

    Attributes:
      length: int32 [B,N], tokens in the cache, the step's own included.
      kept: int32 [B,N,L,K], tokens attended by each kv head.
      mass: float32 [B,N,L], share of the estimated attention mass in the kept tokens, mean over query heads; NaN under
        a selector that estimates none.
      bytes_read, bytes_dense: float32 [B,N,L], bytes of the cache that the step reads, and that dense attention would.
      verified: float32 [B,N,L], share of all attention in the tokens attended, as exact attention to them shows it,
        mean over query heads.
      bound: float32 [B,N,L], what that share is at least, but with probability config.failure_rate: the least of the
        layer's query heads.
      extended, certified: float32 [B,N,L], shares of the query heads that had a second round, and whose bound is p or
        more.
      The last four are None where the configuration's selection is "plain", or there is none.
    """

    length: jax.Array
    kept: jax.Array
    mass: jax.Array
    bytes_read: jax.Array
    bytes_dense: jax.Array
    verified: jax.Array | None = None
    bound: jax.Array | None = None
    extended: jax.Array | None = None
    certified: jax.Array | None = None

    @property
    def kept_fraction(self):
        """float [B,N], share of the cache's tokens attended, mean over layers and kv heads; 0 after the end."""
        return self.kept.mean(axis=(2, 3)) / self.length.clip(1)

    @property
    def bytes_read_fraction(self):
        """float [B,N], bytes of the caches that the step reads, over those of dense attention; 0 after the end."""
        return self.bytes_read.sum(axis=2) / self.bytes_dense.sum(axis=2).clip(1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """State of the decode loop.

    Attributes:
      cache: holds the prompt and the first `step` generated tokens.
      token: int32 [B], the token to feed next.
      finished: bool [B], an EOS token has been fed.
      finite: bool [B], no NaN or infinity so far in attention outputs or logits.
      step: int32 [], steps done.
      tokens: int32 [B,N], generated tokens; `step` of them are final, and one more is there if step < N.
      lengths: int32 [B], tokens generated, EOS included.
      stats: StepStats of N steps.
    """

    cache: LoopCache
    token: jax.Array
    finished: jax.Array
    finite: jax.Array
    step: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    stats: StepStats


class ModelDefinition:
    """A Flax NNX model without its parameters: a static argument that hashes in no time.

    nnx.split gives a graph definition whose hash, and a state whose flattening, walk the whole model in Python: two
    milliseconds for 32 layers, which would be paid for every token.
    """

    def __init__(self, graphdef, treedef):
        self._parts = (graphdef, treedef)
        self._hash = hash(self._parts)

    @classmethod
    def split(cls, model) -> "tuple[ModelDefinition, list[jax.Array]]":
        """The model's definition and its parameters."""
        graphdef, state = nnx.split(model)
        params, treedef = jax.tree.flatten(state)
        return cls(graphdef, treedef), params

    def merge(self, params: list[jax.Array]):
        """The model with these parameters."""
        graphdef, treedef = self._parts
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, params))

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or (isinstance(other, ModelDefinition) and self._parts == other._parts)


@functools.partial(
    jax.jit, static_argnames=("definition", "config", "fresh", "last"), donate_argnames=("cache", "hidden")
)
def prefill_chunk(
    definition: ModelDefinition, params, cache: Cache, hidden, tokens, new_tokens, total_length, *,
    config: RaBitQConfig | Selector | None, fresh: bool, last: bool,
):  # fmt: skip
    """Append one chunk of the prompts to the cache.

    Args:
      hidden: [B,hidden], final hidden state of each sequence's last token so far.
      tokens: int32 [B,C]; the first new_tokens[b] are real.
      total_length: int32 [B], tokens in the cache after the last chunk.
      fresh, last: as in `attention.prefill`.

    Returns:
      cache, hidden.
    """
    model = definition.merge(params)

    def attend(layer, query, key, value, layer_cache):
        del layer
        out, layer_cache = attention.prefill(
            query, key, value, layer_cache, config, new_tokens=new_tokens, fresh=fresh, last=last
        )
        return out, layer_cache, None

    start = cache.length
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    out, layers, _ = model(tokens, positions, total_length, cache.layers, attend)
    last_out = jnp.take_along_axis(out, jnp.maximum(new_tokens - 1, 0)[:, None, None], axis=1)[:, 0]
    hidden = jnp.where((new_tokens > 0)[:, None], last_out, hidden)
    return dataclasses.replace(cache, layers=layers), hidden


@functools.partial(
    jax.jit, static_argnames=("definition", "sampling", "num_steps", "verified"), donate_argnames=("cache",)
)
def start_decoding(
    definition: ModelDefinition, params, cache: Cache, hidden, key, *, sampling: Sampling, num_steps: int,
    verified: bool = False,
) -> DecodeState:  # fmt: skip
    """Sample the first token of every sequence from the prompt's last hidden state.

    Args:
      num_steps: N, decode steps that there is room for.
      verified: the steps are taken under a configuration that verifies what they capture.
    """
    logits = definition.merge(params).logits(hidden)
    token = sample(logits, sampling, _sampling_key(key, 0))
    batch, kv_heads = cache.layers[0].keys.shape[:2]
    shape = (batch, num_steps, len(cache.layers))
    verified_stats = {name: jnp.zeros(shape, jnp.float32) for name in VERIFIED} if verified else {}
    return DecodeState(
        cache=LoopCache.of(cache.layers, cache.rotation_seed),
        token=token,
        finished=jnp.zeros((batch,), bool),
        finite=jnp.all(jnp.isfinite(logits), axis=-1),
        step=jnp.int32(0),
        tokens=jnp.zeros((batch, num_steps), jnp.int32).at[:, 0].set(token),
        lengths=jnp.ones((batch,), jnp.int32),
        stats=StepStats(
            length=jnp.zeros(shape[:2], jnp.int32),
            kept=jnp.zeros((*shape, kv_heads), jnp.int32),
            mass=jnp.zeros(shape, jnp.float32),
            bytes_read=jnp.zeros(shape, jnp.float32),
            bytes_dense=jnp.zeros(shape, jnp.float32),
            **verified_stats,
        ),
    )


@functools.partial(
    jax.jit,
    static_argnames=("definition", "num_steps", "config", "sampling", "eos_token_ids"),
    donate_argnames=("state",),
)
def decode_steps(
    definition: ModelDefinition, params, state: DecodeState, key, stop, *,
    num_steps: int, config: RaBitQConfig | Selector | None, sampling: Sampling, eos_token_ids: tuple[int, ...],
):  # fmt: skip
    """Decode `num_steps` steps, of which those from step `stop` on (int32 [], at most N) change nothing.

    Step i feeds token i, which has been sampled, and samples token i + 1: when step N is reached, the cache holds all
    the tokens that were generated. How many steps are taken is known when the program is compiled: a loop that asks the
    device whether to go on waits for the answer, and then for a step to be launched anew, for each token.

    Returns:
      state, and (tokens so far [B,N], lengths [B], finished [B]) once more, so that they can be read while the next
      call, which takes the state's buffers, is under way.
    """
    model = definition.merge(params)

    def step(_, state):
        active = ~state.finished & (state.step < stop)
        return _decode_step(model, state, active, key, config, sampling, eos_token_ids)

    state = jax.lax.fori_loop(0, num_steps, step, state)
    return state, jax.tree.map(jnp.copy, (state.tokens, state.lengths, state.finished))


def _sampling_key(key, step):
    """The PRNG key with which a step's token is sampled."""
    return jax.random.split(jax.random.fold_in(key, step))[0]


def rounding_key(key, step):
    """The PRNG key with which a step's queries are rounded."""
    return jax.random.split(jax.random.fold_in(key, step))[1]


def _decode_step(model, state: DecodeState, active, key, config, sampling, eos_token_ids) -> DecodeState:
    """One step of the sequences that are active, bool [B]; the others stay as they are."""
    prng_key = rounding_key(key, state.step)

    # Of the nearest layer below that keeps a state.
    previous = None

    def attend(layer, query, new_key, value, layer_cache):
        nonlocal previous
        out, layer_cache, stats = attention.decode(
            query[:, 0], new_key[:, 0], value[:, 0], layer_cache, config,
            prng_key=prng_key, layer=layer, active=active, previous=previous,
        )  # fmt: skip
        previous = previous if layer_cache.state is None else layer_cache
        return out[:, None], layer_cache, stats

    length = state.cache.length
    hidden, layers, layer_stats = model(
        state.token[:, None], length[:, None], length + active, state.cache.layer_caches(), attend
    )
    logits = model.logits(hidden[:, 0])
    finite = jnp.all(jnp.isfinite(logits), axis=-1)

    finished = state.finished | (active & jnp.isin(state.token, jnp.array(eos_token_ids, jnp.int32)))
    token = sample(logits, sampling, _sampling_key(key, state.step + 1))
    room = state.step + 1 < state.tokens.shape[1]
    goes_on = active & ~finished & room
    following = jnp.minimum(state.step + 1, state.tokens.shape[1] - 1)
    return DecodeState(
        cache=LoopCache.of(layers, state.cache.rotation_seed),
        token=jnp.where(active, token, state.token),
        finished=finished,
        finite=state.finite & (finite | ~active),
        step=state.step + jnp.any(active),
        tokens=state.tokens.at[:, following].set(jnp.where(goes_on, token, state.tokens[:, following])),
        lengths=state.lengths + goes_on,
        stats=_record(state.stats, state.step, layer_stats, active),
    )


def _record(stats: StepStats, step, layer_stats, active) -> StepStats:
    """Write one step's stats of all layers into column `step`, for the active sequences."""
    verified_stats = {}
    if stats.verified is not None:
        verified_stats = {
            name: reduce(jnp.stack([getattr(s, name) for s in layer_stats], axis=1), axis=-1)
            for name, reduce in VERIFIED.items()
        }
    now = StepStats(
        length=layer_stats[0].length,
        kept=jnp.stack([s.kept for s in layer_stats], axis=1),
        mass=jnp.mean(jnp.stack([s.mass for s in layer_stats], axis=1), axis=-1),
        bytes_read=jnp.stack([s.bytes_read for s in layer_stats], axis=1),
        bytes_dense=jnp.stack([s.bytes_dense for s in layer_stats], axis=1),
        **verified_stats,
    )

    def write(history, new):
        return history.at[:, step].set(
            jnp.where(active.reshape(-1, *(1,) * (new.ndim - 1)), new, 0).astype(history.dtype)
        )

    return jax.tree.map(write, stats, now)
