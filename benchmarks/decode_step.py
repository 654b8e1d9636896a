"""Time of a decode step of a whole model, Llama-3.1-8B's shape with random weights, dense and with a RaBitQ cache.

    python -m benchmarks.decode_step --batch 1          # writes benchmarks/results/decode_step.json

The step is `generate`'s own. After each one the cache is put back by a token, so that every step decodes the same token
at the same place, and its queries are those for which heavy tokens were planted. "rest" is the step without attention.
"""

import dataclasses
import functools
from collections.abc import Sequence

import click
import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import timing
from benchmarks.byte_counts import attention_bytes, code_bytes, weight_bytes
from benchmarks.checks import check, relative_error
from benchmarks.make_checkpoint import SHAPES
from benchmarks.planting import ROUNDING_KEY, kept_facts, planted_cache, select
from benchmarks.record import commit_option, write_row
from benchmarks.shapes import KEPT, ROOM
from benchmarks.suite import announce_device, weighed
from models import Llama
from rabitq_jax import Cache, RaBitQConfig, Sampling, attention, decoding
from rabitq_jax._dispatch import on_gpu
from rabitq_jax.cache import LayerCache
from rabitq_jax.decoding import DecodeState, ModelDefinition, decode_steps, start_decoding

STEPS = 10
CHECKED_MODEL = dataclasses.replace(SHAPES["demo"], num_layers=2)


def measure(model: Llama, config: RaBitQConfig, bandwidth: float, *, batch: int, tokens: int, share: float) -> dict:
    definition, params = ModelDefinition.split(model)
    state, masses = planted_state(model, config, batch=batch, tokens=tokens, share=share)
    sparse, state = step_times(definition, params, state, config)
    traced, state = traced_step(definition, params, state, config)
    check("the model (outputs that are not finite)", 1 - float(state.finite.mean()), 0)
    kept = state.stats.kept[:, 0]
    sparse_bytes = weight_bytes(model) + cache_bytes(state.cache.layer_caches(), config, kept)
    dense, state = step_times(definition, params, without_codes(state), None)
    dense_bytes = weight_bytes(model) + cache_bytes(state.cache.layer_caches(), config, state.stats.kept[:, 0])
    rest = rest_times(definition, params, state, model.config.num_layers)
    return {
        "kept": float((kept[:, config.dense_layers :].mean(axis=(1, 2)) / state.stats.length[:, 0]).mean()),
        **masses,
        **walls(sparse, sparse_bytes, bandwidth),
        **traced,
        "dense": {"xla": walls(dense, dense_bytes, bandwidth)},
        "rest": walls(rest, weight_bytes(model), bandwidth),
    }


def cache_bytes(layers: Sequence[LayerCache], config: RaBitQConfig, kept: jax.Array) -> float:
    """Bytes that a step which attends `kept` tokens, int32 [B,L,K], reads of the caches."""
    codes = sum(code_bytes(layer, config.sink) for layer in layers if layer.codes is not None)
    return codes + attention_bytes(layers[0], int(kept.sum()))


def walls(times: timing.Times, bytes_moved: float, bandwidth: float) -> dict:
    """Wall time, and its share of the byte floor."""
    return {"wall_us": dataclasses.asdict(times), **weighed(bytes_moved, bandwidth, times.median)}


def planted_state(
    model: Llama, config: RaBitQConfig, *, batch: int, tokens: int, share: float
) -> tuple[DecodeState, dict]:
    """A state about to decode a token, with every layer's cache planted for that token's queries; and the mass kept.

    The layers are gone through one by one, since the queries of each follow from the attention of those before.
    """
    shape, coded = model.config, dataclasses.replace(config, dense_layers=0)
    key = jax.random.key(0)
    token = jax.random.randint(key, (batch,), 0, shape.vocab_size)
    length = jnp.full((batch,), tokens - ROOM, jnp.int32)
    layers, facts = [], []

    def attend(layer, query, new_key, value, _):
        layer_config = None if layer < config.dense_layers else coded
        grouped = query.reshape(batch, shape.num_kv_heads, -1, shape.head_dim)
        cache = planted_cache(
            jax.random.fold_in(key, layer), grouped, jnp.full((batch,), share), length,
            tokens=tokens, config=layer_config,
        )  # fmt: skip
        layers.append(cache)
        if layer_config is not None:
            facts.append(kept_facts(grouped, cache, select(grouped, cache, coded)))
        # As the timed step rounds: other roundings give other queries to the layers above.
        rounding_key = decoding.rounding_key(jax.random.key(ROUNDING_KEY), 0)
        out = _attend(query[:, 0], new_key[:, 0], value[:, 0], cache, layer_config, rounding_key, layer)
        return out[:, None], None, None

    hidden, _, _ = model(token[:, None], length[:, None], length + 1, (None,) * shape.num_layers, attend)
    definition, params = ModelDefinition.split(model)
    cache = Cache(layers=tuple(layers), rotation_seed=jnp.uint32(config.rotation_seed))
    # Two steps' room: in the last one nothing is sampled.
    state = start_decoding(definition, params, cache, hidden[:, 0], key, sampling=Sampling(), num_steps=2)
    masses = ("estimated_mass", "true_mass")
    mean = {name: sum(layer[name] for layer in facts) / len(facts) for name in masses}
    least = min(layer["least_true_mass"] for layer in facts)
    return dataclasses.replace(state, token=token), mean | {"least_true_mass": least}


@functools.partial(jax.jit, static_argnames="config")
def _attend(query, key, value, cache, config, rounding_key, layer):
    return attention.decode(query, key, value, cache, config, prng_key=rounding_key, layer=layer)[0]


def without_codes(state: DecodeState) -> DecodeState:
    """The same state for dense decoding; it shares the buffers."""
    layers = tuple(dataclasses.replace(layer, codes=None) for layer in state.cache.layers)
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers))


def step_times(definition, params, state: DecodeState, config: RaBitQConfig | None, **options):
    """Wall time of a step, and the state after it, which is where it was."""
    return timing.step_times(repeated(definition, config), state, params, steps=STEPS, **options)


def traced_step(definition, params, state: DecodeState, config: RaBitQConfig) -> tuple[dict, DecodeState]:
    """What the device does in a step, and what the step takes without CUDA graphs."""
    if not on_gpu():
        return {}, state
    step, options = repeated(definition, config), {"compiler_options": timing.NO_CUDA_GRAPHS}
    line, state = timing.timeline(step, state, params, steps=STEPS)
    bare, state = timing.timeline(step, state, params, steps=STEPS, **options)
    check("the step without CUDA graphs (share of launches in graphs)", bare.in_graphs, 0)
    without, state = step_times(definition, params, state, config, **options)
    traced = {
        "timeline": dataclasses.asdict(line),
        "without_graphs": {"wall_us": dataclasses.asdict(without), "in_graphs": bare.in_graphs},
    }
    return traced, state


def repeated(definition, config: RaBitQConfig | None):
    """A decode step that leaves the state where it was."""

    def step(_, state, params):
        after, _ = decode_steps(
            definition, params, state, jax.random.key(ROUNDING_KEY), 1,
            num_steps=1, config=config, sampling=Sampling(), eos_token_ids=(),
        )  # fmt: skip
        return rewound(after, state)

    return step


def rewound(after: DecodeState, before: DecodeState) -> DecodeState:
    """The state after a step, about to decode the same token again."""
    cache = dataclasses.replace(after.cache, length=before.cache.length, quantized=before.cache.quantized)
    return dataclasses.replace(after, cache=cache, token=before.token, step=before.step, lengths=before.lengths)


def rest_times(definition, params, state: DecodeState, num_layers: int) -> timing.Times:
    """Wall time of a step whose attention returns the queries: embedding, projections, MLPs, head."""

    def step(_, token, params, length):
        model = definition.merge(params)
        attend = lambda layer, query, key, value, cache: (query, None, (key, value))  # noqa: E731
        hidden, _, unused = model(token[:, None], length[:, None], length + 1, (None,) * num_layers, attend)
        return timing.after(token, (model.logits(hidden[:, 0]), unused))

    return timing.step_times(step, jnp.copy(state.token), params, state.cache.length, steps=STEPS)[0]


def check_against_dense(config: RaBitQConfig) -> float:
    """Error of a step of two layers at p = 1, in the second one's new keys, which show what the first attends."""
    config = dataclasses.replace(config, dense_layers=0)
    model = Llama(CHECKED_MODEL, rngs=nnx.Rngs(0))
    definition, params = ModelDefinition.split(model)
    state, _ = planted_state(model, config, batch=1, tokens=1024, share=0.25)
    slot = int(state.cache.length[0])
    new_keys = []
    for state_config, before in ((dataclasses.replace(config, top_p=1.0), state), (None, without_codes(state))):
        fed = jax.tree.map(jnp.copy, before)  # Both share buffers, which a step takes.
        after, _ = decode_steps(
            definition, params, fed, jax.random.key(0), 1,
            num_steps=1, config=state_config, sampling=Sampling(), eos_token_ids=(),
        )  # fmt: skip
        new_keys.append(after.cache.layers[-1].keys[:, :, slot])
    return check("a decode step at p = 1", relative_error(*new_keys), 0.05)


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", "name", type=click.Choice(list(SHAPES)), help="Default: llama-3.1-8b; without a GPU, demo.")
@click.option("--batch", "batches", multiple=True, type=int, default=(1,), show_default=True, help="May be repeated.")
@click.option("--tokens", type=int, help="Capacity of the cache; default: 131072; without a GPU, 2048.")
@click.option("--share", type=float, help=f"Share of the tokens to keep; default: {KEPT}; without a GPU, 0.2.")
@click.option("--top-p", default=0.95, show_default=True, help="Share of the attention mass to keep.")
@commit_option
def main(name: str, batches: tuple[int, ...], tokens: int, share: float, top_p: float, commit: str) -> None:
    announce_device()
    name = name or ("llama-3.1-8b" if on_gpu() else "demo")
    tokens = tokens or (131072 if on_gpu() else 2048)
    share = share or (KEPT if on_gpu() else 0.2)
    config = RaBitQConfig(top_p=top_p)
    error = check_against_dense(config)
    bandwidth = timing.bandwidth()
    model = Llama(SHAPES[name], rngs=nnx.Rngs(0))
    for batch in batches:
        row = {"case": f"{name} B{batch}-T{tokens}", "model": name, "batch": batch, "tokens": tokens, "top_p": top_p}
        row |= {"error": error} | measure(model, config, bandwidth, batch=batch, tokens=tokens, share=share)
        write_row("decode_step.json", row, commit=commit)
        click.echo(
            f"{row['case']}: {row['wall_us']['median'] / 1000:.2f} ms, {row['share_of_floor']:.0%} of the floor; "
            f"dense {row['dense']['xla']['wall_us']['median'] / 1000:.2f}; without attention "
            f"{row['rest']['wall_us']['median'] / 1000:.2f}, {row['rest']['share_of_floor']:.0%} of the floor; "
            f"kept {row['kept']:.2%}, which holds {row['true_mass']:.1%}"
        )


if __name__ == "__main__":
    main()
