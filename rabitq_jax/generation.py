"""`generate`: prompts in, tokens out, with a RaBitQ cache between."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rabitq_jax._dispatch import on_gpu
from rabitq_jax._stopwatch import Stopwatch
from rabitq_jax.cache import AttentionShape, Cache, init_cache, round_capacity
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.decoding import DecodeState, ModelDefinition, StepStats, decode_steps, prefill_chunk, start_decoding
from rabitq_jax.sampling import Sampling
from rabitq_jax.selectors import Selector

Tokens = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array


class DecoderConfig(AttentionShape, Protocol):
    """What `generate` asks of a model's configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class Decoder(Protocol):
    """What `generate` asks of a model, a Flax NNX module; models.Llama is one.

    Calling it with tokens and positions [B,N], the total length [B] of each sequence after the call, one cache a layer,
    and `attend(layer, query [B,N,H,D], key, value [B,N,K,D], cache) -> (out, cache, stats)` returns the final hidden
    states [B,N,hidden], the caches and the stats. `logits` maps hidden states to float32 [..., vocabulary].
    """

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __call__(self, tokens, positions, total_length, caches, attend) -> tuple: ...
    def logits(self, hidden) -> jax.Array: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: int32 [B,N]; entries at or past `lengths` are 0.
      lengths: int32 [B], tokens generated, the EOS token included.
      cache: holds the prompt and all generated tokens: pass it to the next call to go on.
      stats: `StepStats` of N steps; step i is the one that reads the cache for the token after token i.
      finite: bool [B]; False says that NaN or infinity came up in attention or logits, and that the text is worthless.
      prefill_seconds, decode_seconds: wall time, without compiling.
      compile_seconds: what tracing and compiling took, in both.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    cache: Cache
    stats: StepStats
    finite: np.ndarray
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float


def generate(
    model: Decoder,
    tokens: Tokens,
    config: RaBitQConfig | Selector | None = None,
    *,
    max_new_tokens: int,
    key: jax.Array,
    sampling: Sampling = Sampling(),  # noqa: B008
    eos_token_ids: Iterable[int] | None = None,
    cache: Cache | None = None,
    capacity: int | None = None,
    on_token: Callable[[int, np.ndarray], None] | None = None,
    progress: bool = False,
) -> Generation:
    """Continue prompts by up to `max_new_tokens` tokens each.

    Programs are compiled once for each batch size, capacity and configuration; name a capacity to share them between
    prompts of different lengths.

    Args:
      model: a Flax NNX decoder, such as `models.load_pretrained` returns.
      tokens: one prompt, or one a sequence of the batch: a list, a list of lists of any lengths, or an array [B,N].
      config: a RaBitQConfig, or another retrieval method of rabitq_jax.selectors; None attends densely.
      key: PRNG key. The same key gives the same tokens.
      sampling: greedy by default.
      eos_token_ids: a sequence ends with one of these; the model's by default, () for no end.
      cache: of an earlier call, whose conversation the prompts continue. It is consumed: its buffers are reused.
      capacity: tokens that a new cache can hold; by default what this call needs.
      on_token: called as on_token(step, int [B]) for each step in turn, soon after its tokens are known (a fast
        model's come a few at a time); -1 for finished sequences.
      progress: show a progress bar of the prefill on stderr.

    Raises:
      ValueError: before anything is computed: a prompt is empty, a token is not in the vocabulary, `max_new_tokens` is
        not positive, prompt and new tokens do not fit the capacity, or the cache does not fit model, batch or config.

    Warns:
      UserWarning: the sequence passes the range of positions that the model was made for.
    """
    prompts = _as_prompts(tokens, model.config.vocab_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    held = np.zeros(len(prompts), np.int32)
    if cache is not None:
        _check_cache(cache, len(prompts), capacity, model, config)
        capacity = cache.capacity
        held = np.asarray(cache.length)
    needed = max(int(before) + len(prompt) for before, prompt in zip(held, prompts, strict=True)) + max_new_tokens
    if capacity is None:
        capacity = round_capacity(needed, config)
    if needed > capacity:
        raise ValueError(
            f"capacity is {capacity} tokens, but {needed} are needed: up to {held.max()} in the cache, a prompt of up "
            f"to {max(map(len, prompts))}, and {max_new_tokens} new"
        )
    if needed > model.config.max_position:
        warnings.warn(
            f"prompt and new tokens make {needed} positions; the model was made for {model.config.max_position}",
            stacklevel=2,
        )
    if cache is None:
        cache = init_cache(model.config, len(prompts), capacity, config, dtype=model.dtype)
    eos = model.config.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)

    definition, params = ModelDefinition.split(model)
    hidden = jnp.zeros((len(prompts), model.config.hidden_size), model.dtype)
    # A power of two, so that few programs serve all values of max_new_tokens.
    num_steps = 1 << (max_new_tokens - 1).bit_length()

    def run(state, stop, steps):
        return decode_steps(
            definition, params, state, key, jnp.int32(stop),
            num_steps=steps, config=config, sampling=sampling, eos_token_ids=eos,
        )  # fmt: skip

    prefill_watch, decode_watch = Stopwatch(), Stopwatch()
    with prefill_watch:
        cache, hidden = feed_prompts(definition, params, cache, hidden, prompts, held, config=config, progress=progress)
        state = start_decoding(
            definition, params, cache, hidden, key,
            sampling=sampling, num_steps=num_steps,
            verified=isinstance(config, RaBitQConfig) and config.selection != "plain",
        )  # fmt: skip
        jax.block_until_ready(state.token)
    with decode_watch:
        state = _decode(run, state, max_new_tokens, on_token)
        jax.block_until_ready(state.tokens)
    lengths = np.minimum(np.asarray(state.lengths), max_new_tokens)
    generated = np.asarray(state.tokens)[:, :max_new_tokens]
    return Generation(
        tokens=np.where(np.arange(max_new_tokens) < lengths[:, None], generated, 0),
        lengths=lengths,
        cache=state.cache.to_cache(),
        stats=jax.tree.map(lambda x: np.asarray(x)[:, :max_new_tokens], state.stats),
        finite=np.asarray(state.finite),
        prefill_seconds=prefill_watch.seconds,
        decode_seconds=decode_watch.seconds,
        compile_seconds=prefill_watch.compile_seconds + decode_watch.compile_seconds,
    )


def _as_prompts(tokens: Tokens, vocab_size: int) -> list[np.ndarray]:
    """The prompts as checked int32 arrays, one a sequence."""
    if isinstance(tokens, jax.Array):
        tokens = np.asarray(tokens)
    if len(tokens) == 0:
        raise ValueError("tokens is empty: a prompt needs at least one token")
    rows = [tokens] if np.ndim(tokens[0]) == 0 else tokens
    prompts = []
    for b, row in enumerate(rows):
        prompt = np.asarray(row)
        if prompt.size == 0:
            raise ValueError(f"prompt {b} is empty: a prompt needs at least one token")
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"prompt {b} must be a list of token ids, got {prompt.dtype} of shape {prompt.shape}")
        outside = prompt[(prompt < 0) | (prompt >= vocab_size)]
        if outside.size:
            raise ValueError(f"prompt {b} has token {outside[0]}, outside the vocabulary of {vocab_size}")
        prompts.append(prompt.astype(np.int32))
    return prompts


def _check_cache(
    cache: Cache, batch: int, capacity: int | None, model: Decoder, config: RaBitQConfig | Selector | None
):
    """Check that a cache was made for this batch, capacity, model and configuration."""
    if capacity is not None and capacity != cache.capacity:
        raise ValueError(f"capacity is {capacity}, but the cache that was passed has {cache.capacity}")
    shape = model.config
    expected = jax.eval_shape(lambda: init_cache(shape, batch, cache.capacity, config, dtype=model.dtype))
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
    if jax.tree.structure(expected) != jax.tree.structure(given):
        raise ValueError("cache was made with another config or model: its layers have other parts")
    for (path, want), got in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(given), strict=True):
        if want.shape != got.shape or want.dtype != got.dtype:
            raise ValueError(
                f"cache does not fit the batch, model or config: {jax.tree_util.keystr(path)} must be {want.dtype} "
                f"{want.shape}, got {got.dtype} {got.shape}"
            )
    if isinstance(config, RaBitQConfig) and int(cache.rotation_seed) != config.rotation_seed:
        raise ValueError(
            f"cache was made with rotation_seed {int(cache.rotation_seed)}, but config has {config.rotation_seed}"
        )


def feed_prompts(definition, params, cache, hidden, prompts, held, *, config, progress=False):
    """Feed the prompts chunk by chunk; shorter ones end early. Returns the cache and the last hidden states."""
    prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(prompt_lengths.max())
    padded = np.stack([np.pad(prompt, (0, longest - len(prompt))) for prompt in prompts])
    start = 0
    with tqdm(total=longest, desc="prefill", unit="tok", disable=not progress) as bar:
        while start < longest:
            fresh = start == 0 and not held.any()
            tokens = padded[:, start : start + _chunk_size(len(prompts), fresh=fresh)]
            size = tokens.shape[1]
            cache, hidden = prefill_chunk(
                definition, params, cache, hidden,
                np.pad(tokens, ((0, 0), (0, _padded_size(size) - size))),
                np.clip(prompt_lengths - start, 0, size),
                held + prompt_lengths,
                config=config, fresh=fresh, last=start + size == longest,
            )  # fmt: skip
            if progress:
                jax.block_until_ready(hidden)
            bar.update(size)
            start += size
    return cache, hidden


def _chunk_size(batch: int, *, fresh: bool) -> int:
    """Tokens of a prefill chunk. On a GPU a new prompt goes through in one causal call, up to the memory that 128K
    tokens of activations take; later chunks attend under a mask, whose size grows with the chunk."""
    if not on_gpu():
        return 512
    return max(2048, 131072 // batch) if fresh else 2048


def _padded_size(tokens: int) -> int:
    """Chunk sizes that programs are compiled for: powers of two from 16 to 512, then multiples of 512."""
    return max(16, 1 << (tokens - 1).bit_length()) if tokens <= 512 else -(-tokens // 512) * 512


def _steps_per_call(max_new_tokens: int) -> int:
    """Decode steps of a call, a power of two: a call costs the host a millisecond or two, which must not be paid for
    each token of a fast model. Those after the last token are wasted, and tokens are handed out a call at a time."""
    return min(8 if on_gpu() else 4, 1 << (max_new_tokens - 1).bit_length())


def _decode(run, state: DecodeState, max_new_tokens: int, on_token) -> DecodeState:
    """Call after call, until all is done. One is under way while the tokens of the last are read and handed out."""
    steps = _steps_per_call(max_new_tokens)
    handed_out = 0

    def hand_out(tokens, lengths, stop):
        nonlocal handed_out
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        for step in range(handed_out, min(stop, int(lengths.max()))):
            on_token(step, np.where(step < lengths, tokens[:, step], -1))
        handed_out = stop

    def read(result, calls_done) -> bool:
        """Whether all sequences are finished."""
        tokens, lengths, finished = result
        if on_token is not None:
            hand_out(tokens, lengths, min(calls_done * steps + 1, max_new_tokens))
        return bool(np.asarray(finished).all())

    read((state.tokens, state.lengths, state.finished), 0)
    last, calls = None, -(-max_new_tokens // steps)
    for call in range(calls):
        state, result = run(state, max_new_tokens, steps)
        if last is not None and read(last, call):
            return state
        last = result
    read(last, calls)
    return state
