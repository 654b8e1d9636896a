"""Scores, kept as one byte each and counted where they are made; for Hopper GPUs.

Warps score (mosaic_scorers.py). Counts of bins, and sums of depth - bin in steps of 1/256, gather in shared memory
(mosaic_counters.py), and are added to the row's at the end of a block of tokens. They are integers, so the result is
the same in every run. Tokens of the last bin are not counted: they are the rest of those scored.

Bin 0 says little of scores above base. But each lane knows the largest of its own. The exponentials of those above
base, added up over a warp, are worth so many tokens of the warp's largest score, and no more than the warp holds: the
row counts these, in steps of 1/256, in bins that go up from base.

Where estimates z come with their deviation sd = noise * scale, tokens are counted as certified selection wants them
(rabitq_jax/thresholds.py): by their debiased logits z - sd^2 / 2. The byte is the bin of what they are kept by,
z + sd^2 / 2.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import HEADS, State
from pallas_kernels.mosaic_code_copies import STEP_TOKENS
from pallas_kernels.mosaic_counters import LARGEST_COUNT, Counters
from pallas_kernels.mosaic_scorers import DEPTHS_PER_NAT, LEAST_BLOCK_TOKENS, NoisyScorer, Scorer, Sizes

BLOCK_TOKENS = 2048
# Steps that a warp takes in a round of a loop where blocks are few, up to five on each of 132 multiprocessors: then it
# may have many registers.
IN_ROW, FEW_BLOCKS = 4, 660


def takes(tokens: int, words: int, centroids: int) -> bool:
    """Whether `score_bins` takes a capacity, words a code, and a number of centroids."""
    return (
        (words == 2 or words % 4 == 0) and tokens % LEAST_BLOCK_TOKENS == 0 and tokens // centroids % STEP_TOKENS == 0
    )


def score_bins(
    planes, factors, base, shift, bits, scale, bias, bias_gain, state, *, group: int, first: int, stop, noise=None
):
    """Bins of scores, their counts, and the largest score.

    Args:
      planes, factors, base, shift: of `rabitq_jax.prepared_query.PreparedQuery`, [B,K,H,...]; G heads are real.
      noise: float32 [B,K,H], nats of deviation for each unit of scale, or None.
      bits, scale, bias, bias_gain: as in `rabitq_jax.scores.proxy_scores_reference`.
      state: a reference, int32 [B,K,Z] with Z of `mosaic_bins.state_words`, all zero; the kernel adds to it.
      group: G.
      first: python int; stop: int32 [B]. Tokens in [first, stop) are scored.

    Returns:
      Bins int32 [B,K,T/8,G,2], undefined outside [first, stop).

    Raises:
      NotImplementedError: `takes` is False.
    """
    batch, kv_heads, heads = shift.shape[:3]
    tokens, words = bits.shape[2:]
    centroids = shift.shape[-1]
    if not takes(tokens, words, centroids):
        raise NotImplementedError(
            f"the kernel takes codes of 64 or multiples of 128 bits, capacities of multiples of {LEAST_BLOCK_TOKENS} "
            f"tokens and centroids of multiples of {STEP_TOKENS}, got {32 * words}, {tokens} and {tokens // centroids}"
        )
    block = math.gcd(tokens, BLOCK_TOKENS)
    assert block <= LARGEST_COUNT
    blocks = batch * kv_heads * (tokens // block)
    sizes = Sizes(
        kv_heads=kv_heads, group=group, groups=heads // HEADS, tokens=tokens, words=words, centroids=centroids,
        block=block, state_words=state.shape[-1], first=first, bias_gain=None if bias is None else float(bias_gain),
        noisy=noise is not None, in_row=IN_ROW if blocks <= FEW_BLOCKS else 1,
    )  # fmt: skip
    optional = [x for x in (bias, noise) if x is not None]
    return m.call(
        functools.partial(_kernel, sizes),
        name="score_bins",
        out_type=jax.ShapeDtypeStruct((batch, kv_heads, tokens // 8, group, 2), jnp.int32),
        blocks=blocks,
        shared_words=Counters.words(sizes.groups) + sizes.run.shared_words,
    )(planes, factors, base, shift, bits, scale, *optional, stop, state)


def _kernel(sizes: Sizes, planes, factors, base, shift, bits, scale, *rest):
    """planes [R,H,4,W], factors [R,H,2], base [R,H], shift [R,H,C], bits [R,T,W], scale (and bias) [R,T], (noise [R,H])
    stop [B]; state [R,Z], added to; bins [R,T/8,G,2]; shared memory. R rows of kv heads, H = heads padded to 4."""
    *optional, stop, state, bins, shared = rest
    bias = optional[: sizes.bias_gain is not None]
    noise = optional[-1] if sizes.noisy else None
    blocks = sizes.tokens // sizes.block
    row = m.divide(m.block_index(), blocks)
    start = m.multiply(m.subtract(m.block_index(), m.multiply(row, blocks)), sizes.block)
    # From the first token on, in unsigned numbers: an empty range must not be less than empty.
    stop = m.maximum_signed(m.load(m.address(stop, m.divide(row, sizes.kv_heads)))[0], sizes.first)
    end = m.add(start, sizes.block)
    shared = m.shared_address(shared)
    counters = Counters(sizes.groups, shared)

    def run(all_scored: bool):
        """Least depths, one a group; and the largest scale where scores are noisy."""
        arrays = planes, factors, base, shift, bits, scale, bias, noise, bins
        codes = m.add(shared, 4 * Counters.words(sizes.groups))
        scorer = (NoisyScorer if sizes.noisy else Scorer)(sizes, row, start, stop, *arrays, counters, codes, all_scored)
        counters.clear()
        return scorer.run()

    def score():
        # Most blocks are scored as a whole, and need not ask token by token.
        whole = m.both(m.not_less(start, sizes.first), m.not_less(stop, end))
        nothing = [m.value(0.0)] * (sizes.groups + sizes.noisy)
        results = m.update(whole, nothing, lambda _: run(all_scored=True), lambda _: run(all_scored=False))
        _flush(sizes, counters, base, state, *results)

    m.when(m.both(m.less(start, stop), m.less(sizes.first, end)), score)


def _flush(sizes: Sizes, counters: Counters, base, state, *results):
    """Add what the block has seen to its row's state."""
    # From here on all is reckoned anew, so that no register holds it while tokens are scored.
    lane = m.bit_and(m.thread_index_anew(), 31)
    row = m.divide(m.block_index_anew(), sizes.tokens // sizes.block)
    state = State(state, row, sizes.padded, sizes.state_words)
    head = m.add(m.multiply(row, sizes.padded), m.bit_and(lane, HEADS - 1))
    bases = [m.as_float(m.load_written(m.address(base, m.add(head, HEADS * h)))[0]) for h in range(sizes.groups)]
    least, largest_scale = results[: sizes.groups], results[sizes.groups :]
    peaks = [m.fma(depth, -1 / DEPTHS_PER_NAT, first) for depth, first in zip(least, bases, strict=True)]
    for scale in largest_scale:
        m.when(m.less(lane, 1), functools.partial(m.max_global, state.largest_scale(), m.as_int(scale)))
    counters.flush(bases, peaks, state)
