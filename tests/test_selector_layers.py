"""What selectors do between layers, between prompts, and with arguments from a command line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import causal_attention
from rabitq_jax import add_codes, generate, init_cache
from rabitq_jax.cache import append, init_selector_cache
from rabitq_jax.selectors import (
    H2O,
    KIVI,
    SELECTORS,
    CacheShape,
    DoubleSparsity,
    DuoAttention,
    ExtendedRaBitQ,
    FullAttention,
    MagicPIG,
    OracleTopK,
    PQCache,
    PyramidKV,
    Quest,
    SnapKV,
    SparQ,
    Step,
    StreamingLLM,
    TidalDecode,
    TopK,
    TopKThenTopP,
    TopP,
    Twilight,
    make_selector,
)
from rabitq_jax.selectors.arguments import parse_arguments
from rabitq_jax.selectors.double_sparsity_calibration import calibrate
from rabitq_jax.selectors.observed_attention import LastQueries
from rabitq_jax.selectors.tidal_decode import SelectingLayer, SharingLayer
from tests.checkpoints import TINY, load, write_model
from tests.selector_cases import BATCH, PROMPT, SHAPE, decode, filled_cache, inputs, softmax

PROMPTS = [np.random.default_rng(0).integers(0, 256, size).tolist() for size in (90, 40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = TINY | {"vocab_size": 256, "head_dim": 32, "num_hidden_layers": 3}
    return load(write_model(tmp_path_factory.mktemp("model"), shape))


def continued(model, selector, **options):
    return generate(
        model, PROMPTS, selector, max_new_tokens=12, key=jax.random.key(0), eos_token_ids=(), capacity=512, **options
    )


@pytest.mark.parametrize(
    "selector",
    [TidalDecode(selection_layers=(0, 2), rule=TopK(budget=1024)), PyramidKV(budget=100000, observed=4)],
    ids=["tidal-decode", "pyramidkv"],
)
def test_methods_of_many_layers_decode_as_dense_attention_does_where_the_budget_is_full(model, selector):
    dense, sparse = continued(model, None), continued(model, selector)
    np.testing.assert_array_equal(sparse.tokens, dense.tokens)
    np.testing.assert_array_equal(sparse.stats.kept, np.broadcast_to(dense.stats.kept, sparse.stats.kept.shape))


def test_tidal_decode_shares_a_selection_with_the_layers_above(model):
    stats = continued(model, TidalDecode(selection_layers=(1,), rule=TopK(budget=10), recent=2)).stats
    kept = np.swapaxes(stats.kept, 0, 2)
    np.testing.assert_array_equal(kept[0], kept[1])
    assert np.all(kept[0] == np.swapaxes(stats.length, 0, 1)[..., None])
    assert np.all(kept[2] <= 2 + 8 * (model.config.num_heads // model.config.num_kv_heads))
    # A mask of one byte a token, and the keys and values of what is kept.
    row = 2 * 4 * model.config.head_dim
    expected = stats.length * model.config.num_kv_heads + row * stats.kept[:, :, 2].sum(axis=-1)
    np.testing.assert_allclose(stats.bytes_read[:, :, 2], expected)


def test_all_layers_above_share_a_selection(model):
    stats = continued(model, TidalDecode(selection_layers=(0,), rule=TopK(budget=10), recent=2)).stats
    np.testing.assert_array_equal(stats.kept[:, :, 1], stats.kept[:, :, 2])
    assert np.all(stats.kept[:, :, 1].max(axis=-1) < stats.length)


def test_a_sharing_layer_attends_what_the_layer_below_selects():
    query, key, value = (x[np.arange(BATCH), PROMPT] for x in inputs())
    active = np.ones(BATCH, bool)
    rule = dict(rule=TopK(budget=20), recent=4)
    below, (_, _, counts, _) = decode(query, key, value, filled_cache(SelectingLayer(**rule)), active)
    assert counts.tolist() == np.repeat(PROMPT[:, None] + 1, 2, axis=1).tolist()
    _, (_, want, want_counts, _) = decode(query, key, value, filled_cache(OracleTopK(**rule)), active)
    cache, (_, indices, counts, _) = decode(query, key, value, filled_cache(SharingLayer(**rule)), active, below.state)
    np.testing.assert_array_equal(counts, want_counts)
    for b in range(BATCH):
        for k in range(2):
            np.testing.assert_array_equal(indices[b, k, : counts[b, k]], want[b, k, : counts[b, k]])
    assert cache.state is None
    with pytest.raises(ValueError, match="previous is None"):
        decode(query, key, value, filled_cache(SharingLayer(**rule)), active)


def test_pyramid_budgets_fall_in_even_steps_and_keep_their_mean():
    pyramid = PyramidKV(budget=264, observed=8, beta=20, dense_layers=1)
    budgets = np.array([pyramid.layer_budget(layer, 32) for layer in range(32)])
    assert budgets[0] == 8 + int(2 * 256 - 256 / 20) and budgets[-1] == 8 + int(256 / 20)
    assert abs(budgets.mean() - 264) < 1 and np.all(np.abs(np.diff(budgets, 2)) <= 1)
    assert pyramid.for_layer(0, 32) == FullAttention()
    assert pyramid.for_layer(31, 32) == SnapKV(budget=int(budgets[-1]), observed=8)
    assert pyramid.layer_budget(0, 1) == 264


@pytest.mark.parametrize("name", SELECTORS)
def test_first_layers_can_be_left_dense_and_every_layer_has_a_state(name):
    selector = SELECTORS[name](dense_layers=1)
    assert selector.for_layer(0, 4) == FullAttention()
    shape = CacheShape(batch=1, capacity=512, num_heads=4, num_kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
    jax.eval_shape(lambda: selector.for_layer(3, 4).init(shape))
    assert 0 <= selector.bytes_per_token(64, 2) <= 2 * 150


@pytest.mark.parametrize(
    "selector",
    [H2O(budget=30), SparQ(channels=8), Quest(page=8), PQCache(parts=4, bits=4)],
    ids=lambda s: type(s).__name__,
)
def test_a_sequence_that_has_ended_keeps_its_state(selector):
    tokens = [x[np.arange(BATCH), PROMPT] for x in inputs()]
    before = filled_cache(selector)
    active = np.array([True, False, True])
    cache, _ = decode(*tokens, before, active)
    assert (cache.length - before.length).tolist() == [1, 0, 1]
    for held, new in zip(jax.tree.leaves(before.state), jax.tree.leaves(cache.state), strict=True):
        np.testing.assert_array_equal(new[1], held[1])


def test_more_bits_estimate_better_and_centring_helps():
    query, key, value = (x[np.arange(BATCH), PROMPT] for x in inputs())
    grouped = query.reshape(BATCH, 2, 2, -1)
    errors, cache = {}, filled_cache(FullAttention())
    step = Step(softmax_scale=1.0, new_tokens=jnp.zeros(BATCH, jnp.int32))
    for bits, centroid in ((1, "none"), (1, "prompt"), (2, "prompt"), (4, "prompt")):
        selector = ExtendedRaBitQ(bits=bits, key_centroid=centroid)
        state = jax.jit(selector.build)(selector.init(SHAPE), cache)
        scores = selector.score(grouped, state, cache, step)
        exact = jnp.einsum("bkgd,bktd->bkgt", grouped, cache.keys)
        errors[bits, centroid] = float(jnp.std((scores - exact)[0, :, :, : PROMPT[0]]))
    one_bare, one, two, four = errors.values()
    assert one_bare > one > 1.7 * two > 1.7 * 3 * four


def test_the_weights_of_tokens_that_are_hardly_ever_sampled_keep_their_digits():
    """Keys at angles up to 0.8 pi from the query, which two of 150 hashes of 10 bits match once in 10^10 draws."""
    angle = np.linspace(0, 0.8 * np.pi, SHAPE.capacity)
    keys = np.zeros((BATCH, 2, SHAPE.capacity, 32), np.float32)
    keys[..., 0], keys[..., 1] = np.cos(angle), np.sin(angle)
    selector = MagicPIG(bits=10, tables=150)
    cache = dataclasses.replace(init_selector_cache(SHAPE, selector), keys=jnp.array(keys))
    query = jnp.zeros((BATCH, 2, 2, 32)).at[..., 0].set(3.0)
    same = (1 - angle / np.pi) ** 10
    chance = 1 - (1 - same) ** 150 - 150 * same * (1 - same) ** 149
    assert 1e-11 < chance[-1] < 1e-9
    # The formula itself has 6 digits left in float64.
    np.testing.assert_allclose(selector.probability(query, cache.state, cache)[0, 0, 0], chance, rtol=0.02)


def test_calibrated_channels_are_the_largest_of_the_text(model, tmp_path):
    tokens = PROMPTS[0]
    channels = calibrate(model, tokens, channels=8)
    assert np.array(channels).shape == (3, 2, 8)
    seen = []

    def attend(layer, query, key, value, cache):
        seen.append((np.abs(query).sum(axis=(0, 1)).reshape(2, -1, 32).sum(axis=1), np.abs(key).sum(axis=(0, 1))))
        return causal_attention(layer, query, key, value, cache)

    model(jnp.array([tokens]), jnp.arange(90)[None], jnp.array([90]), (None,) * 3, attend)
    for layer, (query, key) in enumerate(seen):
        for k in range(2):
            assert set(channels[layer][k]) == set(np.argsort(-query[k] * key[k])[:8].tolist())
    file = tmp_path / "channels.json"
    file.write_text(json.dumps({"channels": channels}))
    selector = make_selector("double-sparsity", calibrated=str(file), budget=100000)
    assert selector == DoubleSparsity(channels=8, calibrated=channels, rule=TopK(budget=100000))
    sparse = continued(model, selector)
    np.testing.assert_array_equal(sparse.cache.layers[2].state.channels[1], channels[2])
    np.testing.assert_array_equal(sparse.tokens, continued(model, None).tokens)


@pytest.mark.parametrize(
    "content",
    ['{"channels": [[0, 1]]}', '{"channels": [[[0, -1]]]}', '{"channels": []}', '{"heads": [[[0]]]}', "[", "{}"],
)
def test_a_file_without_channels_is_told(content, tmp_path):
    file = tmp_path / "channels.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="calibrated must have|calibrated must be a JSON file with 'channels'"):
        make_selector("double-sparsity", calibrated=str(file))


def test_channels_of_another_model_are_told(model):
    for channels, message in (((8, 9, 10, 11, 12, 13, 14, 99), "below 32"), (tuple(range(16)), "8 channels a kv head")):
        with pytest.raises(ValueError, match=message):
            continued(model, DoubleSparsity(channels=8, calibrated=((channels,) * 2,) * 3))
    with pytest.raises(ValueError, match="channels must be a positive multiple of 8, got 12"):
        calibrate(model, PROMPTS[0], channels=12)


def test_given_heads_retrieve(model, tmp_path):
    file = tmp_path / "heads.json"
    file.write_text('{"heads": [[], [1], [0, 1]]}')
    selector = make_selector("duo-attention", heads=str(file), sink=2, recent=4)
    assert selector == DuoAttention(heads=((), (1,), (0, 1)), sink=2, recent=4)
    stats = continued(model, selector).stats
    everything = np.broadcast_to(stats.length[..., None], stats.kept[:, :, 0].shape)
    np.testing.assert_array_equal(stats.kept[:, :, 0], 6)
    np.testing.assert_array_equal(stats.kept[:, :, 1], np.where([False, True], everything, 6))
    np.testing.assert_array_equal(stats.kept[:, :, 2], everything)


def test_a_conversation_goes_on_under_a_selector_and_not_under_another(model):
    selector = TidalDecode(selection_layers=(1,), rule=TopK(budget=10), recent=2)
    first = continued(model, selector)
    again = generate(model, [[1, 2, 3], [4]], selector, max_new_tokens=4, key=jax.random.key(1), cache=first.cache)
    assert again.cache.length.tolist() == [90 + 12 + 3 + 4, 40 + 12 + 1 + 4]
    with pytest.raises(ValueError, match="made with another config"):
        generate(model, [[1], [2]], StreamingLLM(), max_new_tokens=1, key=jax.random.key(1), cache=again.cache)


def test_a_state_can_be_added_to_a_dense_cache(model):
    """As prefilling under the selector makes it, but for methods that learn from queries."""
    dense = continued(model, None).cache
    selector = TidalDecode(selection_layers=(1,), rule=TopK(budget=10), recent=2)
    added = add_codes(dense, selector)
    assert jax.tree.structure(added) == jax.tree.structure(
        init_cache(model.config, 2, 512, selector, dtype=model.dtype)
    )
    pages = add_codes(dense, Quest(page=8)).layers[2].state
    np.testing.assert_array_equal(pages.least[0, :, 3], dense.layers[2].keys[0, :, 24:32].min(axis=1))
    with pytest.raises(ValueError, match="SnapKV learns from the prompt's queries"):
        add_codes(dense, SnapKV())
    with pytest.raises(ValueError, match="codes or a selector already"):
        add_codes(added, Quest())
    assert not DoubleSparsity(calibrated=((tuple(range(16)),) * 2,)).observes and DoubleSparsity().observes


def test_queries_from_before_generated_tokens_are_forgotten():
    """A second prompt's last queries have their own places."""
    shape = CacheShape(batch=1, capacity=512, num_heads=2, num_kv_heads=1, head_dim=32, dtype=jnp.float32)
    cache = init_selector_cache(shape, SnapKV())
    query, key, _ = (x[:1, :, :1] for x in inputs())
    query = np.repeat(query, 2, axis=2)
    last = LastQueries.empty(shape, 8)
    for start, stop in ((0, 20), (20, 23), (30, 35)):
        if start == 30:
            cache = append(cache, key[:, 23:30], key[:, 23:30], jnp.array([7]))
        cache = append(cache, key[:, start:stop], key[:, start:stop], jnp.array([stop - start]))
        last = last.push(query[:, start:stop], cache, jnp.array([stop - start]))
    assert (last.count.tolist(), last.end.tolist()) == ([5], [35])
    want = np.zeros(35)
    for token in range(30, 35):
        want[: token + 1] += softmax(query[0, token] @ key[0, : token + 1, 0].T * 32**-0.5).sum(axis=0)
    np.testing.assert_allclose(last.summed_attention(cache)[0, 0, :35], want, atol=1e-5)


def test_arguments_make_selectors_and_rules():
    assert parse_arguments("page=16,budget=1024,top_p=0.5,selection_layers=2/13,x=true,name=full") == dict(
        page=16, budget=1024, top_p=0.5, selection_layers=(2, 13), x=True, name="full"
    )
    assert make_selector("quest", page=32, budget=64) == Quest(page=32, rule=TopK(budget=64))
    assert make_selector("sparq", top_p=0.5) == SparQ(rule=TopP(top_p=0.5))
    assert make_selector("pqcache", budget=64, top_p=0.5) == PQCache(rule=TopKThenTopP(budget=64, top_p=0.5))
    assert make_selector("twilight", base="full", top_p=0.5) == Twilight(base=FullAttention(), rule=TopP(top_p=0.5))
    assert make_selector("tidal-decode", selection_layers=(1, 2)) == TidalDecode(selection_layers=(1, 2))


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: make_selector("best"), "selector must be one of rabitq, full"),
        (lambda: make_selector("rabitq", page=16), "RaBitQConfig has no argument 'page': it takes attend, "),
        (lambda: make_selector("h2o", page=16), "H2O has no argument 'page': it takes budget, dense_layers, recent$"),
        (
            lambda: make_selector("sparq", page=16),
            "it takes budget, channels, dense_layers, recent, rule, sink, top_p$",
        ),
        (lambda: make_selector("magicpig", layer=1), "MagicPIG has no argument 'layer'"),
        (
            lambda: make_selector("double-sparsity", calibrated="no.json"),
            "calibrated must be a JSON .*'no.json': FileNot",
        ),
        (lambda: make_selector("duo-attention", heads=(1, 2)), r"heads must be a JSON file .*, got \(1, 2\)"),
        (lambda: make_selector("twilight", base="h2o"), "base must be one of quest, full, got 'h2o'"),
        (lambda: parse_arguments("page"), "must be name=value"),
        (lambda: TopK(budget=0), "budget must be a positive integer, got 0"),
        (lambda: TopP(top_p=0), r"top_p must be in \(0, 1\], got 0"),
        (lambda: Quest(page=16, sink=8), "sink must be a multiple of page 16, got 8"),
        (lambda: H2O(budget=8, recent=9), "recent must be at most budget 8, got 9"),
        (lambda: SnapKV(kernel=4), "kernel must be odd, got 4"),
        (lambda: PyramidKV(beta=0.5), "beta must be at least 1, got 0.5"),
        (lambda: DoubleSparsity(channels=12), "channels must be a positive multiple of 8, got 12"),
        (lambda: DoubleSparsity(calibrated=(((0, 1),),)), "calibrated must have 16 channels a kv head, got 2"),
        (lambda: TidalDecode(selection_layers=(3, 2)), "selection_layers must be layers in order"),
        (lambda: TidalDecode(dense_layers=3), "dense_layers must be at most the first selection layer 2, got 3"),
        (lambda: make_selector("quest", rule="all"), "rule must be a budget rule .*, got 'all'"),
        (lambda: Twilight(base="quest"), "base must be a selector, got 'quest'"),
        (lambda: MagicPIG(bits=17), "bits must be at most 16, got 17"),
        (lambda: DuoAttention(retrieval="half"), r"retrieval must be in \[0, 1\], got 'half'"),
        (lambda: DuoAttention(retrieval=True), r"retrieval must be in \[0, 1\], got True"),
        (lambda: DuoAttention(retrieval=2), r"retrieval must be in \[0, 1\], got 2"),
        (lambda: DuoAttention(heads=((0,),)).for_layer(0, 2), "heads must name those of 2 layers, got 1"),
        (lambda: KIVI(bits=3), "bits must be 1, 2, 4 or 8, got 3"),
        (lambda: KIVI(residual=48), "residual must be a positive multiple of 32, got 48"),
        (lambda: ExtendedRaBitQ(key_centroid="block"), "key_centroid must be 'prompt' or 'none', got 'block'"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
