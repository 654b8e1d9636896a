"""Train the small retrieval model that ships with the library, from scratch.

    python -m benchmarks.quality.train

On an H100 it takes twelve minutes. Stopped, it goes on from its last checkpoint. It writes the model in Hugging Face
format to benchmarks/quality/out/model, and the history of its losses to benchmarks/results/training.json, with a
picture.
"""

import dataclasses
import functools
import multiprocessing
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

from benchmarks.byte_tokenizer import ascii_ids, save_byte_tokenizer
from benchmarks.quality import plots
from benchmarks.quality.haystack import standard_library
from benchmarks.quality.training_text import training_sequence
from benchmarks.record import commit_option, write_result
from models import Llama, LlamaConfig, RopeConfig, causal_attention, save_pretrained

OUT = Path(__file__).parent / "out"

CONFIG = LlamaConfig(
    vocab_size=258,
    hidden_size=320,
    mlp_size=960,
    num_layers=5,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    norm_eps=1e-5,
    max_position=32768,
    rope=RopeConfig(theta=500000.0),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """So many steps on sequences of so many tokens."""

    tokens: int
    batch: int
    steps: int


# The sequences grow when the shorter ones have been learned.
STAGES = (
    Stage(tokens=512, batch=128, steps=1200),
    Stage(tokens=2048, batch=32, steps=1200),
    Stage(tokens=8192, batch=8, steps=1000),
    Stage(tokens=16384, batch=4, steps=900),
    Stage(tokens=32768, batch=2, steps=450),
)
LEARNING_RATE, WARMUP, DECAY_SHARE = 1.5e-3, 300, 0.25
TEXT_WEIGHT = 0.3
SEED = 0
LOG_EVERY, SAVE_SECONDS = 25, 60


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Parameters in float32, the optimizer's state, and the number of steps taken (int32 [])."""

    params: nnx.State
    optimizer: optax.OptState
    step: jax.Array


def new_model(config: LlamaConfig) -> Llama:
    """Random weights, each projection's by its number of inputs; those that write to the residual stream smaller."""
    model = Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(SEED))
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        if len(parameter.shape) == 2 and "embed_tokens" not in path:
            writes = "o_proj" in path or "down_proj" in path
            std = parameter.shape[0] ** -0.5 / ((2 * config.num_layers) ** 0.5 if writes else 1)
            weight = parameter.get_value()
            parameter.set_value(weight * (std / jnp.std(weight)))
    return model


def learning_rate(total_steps: int) -> optax.Schedule:
    """Up, level, and down to zero over the last quarter."""
    decay, warmup = int(DECAY_SHARE * total_steps), min(WARMUP, total_steps // 10)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, LEARNING_RATE, warmup),
            optax.constant_schedule(LEARNING_RATE),
            optax.linear_schedule(LEARNING_RATE, 0.0, decay),
        ],
        [warmup, total_steps - decay],
    )


def make_optimizer(total_steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate(total_steps), b1=0.9, b2=0.98, weight_decay=0.05)
    )


def attend(layer, query, key, value, cache):
    """Causal attention over whole sequences: cuDNN's on a GPU."""
    if jax.default_backend() != "gpu":
        return causal_attention(layer, query, key, value, cache)
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn"), cache, None


def losses(definition, params, tokens, is_answer):
    """What is minimized, and (loss on answers, loss on text, share of answer tokens that are the most likely ones)."""
    model = nnx.merge(definition, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    inputs, targets, weight = tokens[:, :-1], tokens[:, 1:], is_answer[:, 1:].astype(jnp.float32)
    batch, length = inputs.shape
    positions = jnp.broadcast_to(jnp.arange(length), inputs.shape)
    hidden, _, _ = model(inputs, positions, jnp.full(batch, length), (None,) * model.config.num_layers, attend)
    logits = model.logits(hidden)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    answers = jnp.maximum(weight.sum(), 1)
    answer_loss, text_loss = (entropy * weight).sum() / answers, (entropy * (1 - weight)).mean()
    right = (jnp.argmax(logits, axis=-1) == targets) * weight
    return answer_loss + TEXT_WEIGHT * text_loss, (answer_loss, text_loss, right.sum() / answers)


def make_step(definition, optimizer: optax.GradientTransformation):
    @functools.partial(jax.jit, donate_argnames=("state",))
    def step(state: TrainState, tokens, is_answer):
        gradient = jax.grad(functools.partial(losses, definition), has_aux=True)
        grads, measures = gradient(state.params, tokens, is_answer)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params=params, optimizer=moments, step=state.step + 1), jnp.stack(measures)

    return step


def make_batch(step: int, tokens: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch of a step, which hangs on SEED and the step alone: token ids int32 [B,T+1] and answers bool [B,T+1].

    A sequence begins with the token that begins a text; one token more than T gives T inputs and T targets.
    """
    haystack, (begin, ids) = standard_library("train"), ascii_ids()
    rows = [training_sequence(haystack, tokens, np.random.default_rng([SEED, step, row])) for row in range(batch)]
    texts, answers = (np.stack(column) for column in zip(*rows, strict=True))
    tokens_of_rows = np.pad(ids[texts], ((0, 0), (1, 0)), constant_values=begin)
    return tokens_of_rows.astype(np.int32), np.pad(answers, ((0, 0), (1, 0)))


def batches(stages: tuple[Stage, ...], first: int, workers: int) -> Iterator[tuple[Stage, np.ndarray, np.ndarray]]:
    """The batches from step `first` on, made ahead of time by other processes."""
    plan = [(step, stage) for step, stage in enumerate(stage for stage in stages for _ in range(stage.steps))][first:]
    # Workers import this module anew: a fork would copy JAX's threads in whatever state they are.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead: deque = deque()
        for step, stage in plan:
            ahead.append((stage, pool.submit(make_batch, step, stage.tokens, stage.batch)))
            if len(ahead) > 4 * workers:
                ready, batch = ahead.popleft()
                yield ready, *batch.result()
        for ready, batch in ahead:
            yield ready, *batch.result()


@click.command(help=__doc__.split("\n")[0])
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True, help="Model and checkpoints.")
@click.option("--workers", default=max(multiprocessing.cpu_count() - 2, 1), help="Processes that make text.")
@click.option("--steps", help="Steps of each stage, as 4000,4000,...; the shipped model's by default.")
@click.option("--stop-after", type=float, help="Stop after so many seconds; the same command goes on.")
@commit_option
def main(out: Path, workers: int, steps: str | None, stop_after: float | None, commit: str) -> None:
    stages = STAGES
    if steps is not None:
        counts = [int(count) for count in steps.split(",")]
        stages = tuple(dataclasses.replace(stage, steps=count) for stage, count in zip(STAGES, counts, strict=True))
    train(CONFIG, stages, out.absolute(), workers=workers, stop_after=stop_after, commit=commit)


def train(
    config: LlamaConfig,
    stages: tuple[Stage, ...],
    out: Path,
    *,
    workers: int,
    stop_after: float | None = None,
    commit: str,
) -> None:
    """Train until the stages are done, or for `stop_after` seconds; write the model in either case."""
    begin = time.perf_counter()
    total = sum(stage.steps for stage in stages)
    definition, params = nnx.split(new_model(config))
    optimizer = make_optimizer(total)
    state = TrainState(params=params, optimizer=optimizer.init(params), step=jnp.int32(0))
    history: list[dict] = []
    with ocp.CheckpointManager(out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        if manager.latest_step() is not None:
            state, history = restore(manager, state)
            click.echo(f"goes on from step {int(state.step)}")
        step = make_step(definition, optimizer)
        earlier = history[-1]["seconds"] if history else 0.0
        saved, pending = begin, []
        first = int(state.step)
        with tqdm(total=total, initial=first, desc="training", unit="step") as bar:
            for index, (stage, tokens, is_answer) in enumerate(batches(stages, first, workers), first + 1):
                state, measures = step(state, tokens, is_answer)
                pending.append(measures)
                bar.update()
                if index % LOG_EVERY == 0 or index == total:
                    seconds = earlier + time.perf_counter() - begin
                    history.append(log_entry(index, stage, pending, seconds))
                    pending = []
                    bar.set_postfix(tokens=stage.tokens, **{k: f"{history[-1][k]:.3f}" for k in ("answers", "text")})
                now = time.perf_counter()
                stopping = stop_after is not None and now - begin > stop_after
                if now - saved > SAVE_SECONDS or stopping or index == total:
                    save(manager, index, state, history)
                    saved = now
                if stopping:
                    break
        manager.wait_until_finished()
    model = nnx.merge(definition, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))
    save_pretrained(model, out / "model")
    save_byte_tokenizer(out / "model")
    content = {
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "history": history,
    }
    path = write_result("training.json", content, commit=commit)
    plots.save(plots.draw_training(content), path.with_suffix(".png"))
    click.echo(path)


def log_entry(step: int, stage: Stage, measures: list[jax.Array], seconds: float) -> dict:
    answers, text, right = np.mean([np.asarray(m) for m in measures], axis=0).tolist()
    return {"step": step, "tokens": stage.tokens, "seconds": seconds, "answers": answers, "text": text, "right": right}


def save(manager: ocp.CheckpointManager, step: int, state: TrainState, history: list[dict]) -> None:
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), history=ocp.args.JsonSave(history)))


def restore(manager: ocp.CheckpointManager, like: TrainState) -> tuple[TrainState, list[dict]]:
    restored = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(state=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore()),
    )
    return restored.state, restored.history


if __name__ == "__main__":
    main()
