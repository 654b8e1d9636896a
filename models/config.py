"""LlamaConfig: the shape of a Llama model, read from and written as Hugging Face's config.json."""

import dataclasses
import typing
from typing import Any, Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: which frequencies the positions turn with.

    Attributes:
      kind: "default"; "linear" (positions divided by `factor`: position interpolation, LongChat); "dynamic" (a base
        that grows with the sequence past `original_max_position`: dynamic NTK); "llama3" (low frequencies divided by
        `factor`, high ones kept, smooth between).
      theta: base of the frequencies.
      factor: of linear, dynamic and llama3.
      low_freq_factor, high_freq_factor: of llama3; wavelengths above original_max_position / low_freq_factor are
        stretched, those below original_max_position / high_freq_factor are kept.
      original_max_position: of dynamic and llama3, the length that the model was trained on before it was extended.

    Raises:
      ValueError: a value is outside its range.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.kind not in typing.get_args(RopeKind):
            raise ValueError(f"rope type must be one of {typing.get_args(RopeKind)}, got {self.kind!r}")
        for name in ("theta", "factor", "low_freq_factor", "original_max_position"):
            _check_positive(f"rope {name}", getattr(self, name))
        if self.factor < 1:
            raise ValueError(f"rope factor must be at least 1, got {self.factor}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope high_freq_factor must be above low_freq_factor, got {self.high_freq_factor} and "
                f"{self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama model; hashable, so that it can be a static argument of a jitted function.

    Attributes:
      max_position: tokens that the model was made for (Hugging Face: max_position_embeddings).
      eos_token_ids: every token that ends a text; may be empty.

    The other attributes are named as in Hugging Face's config.json, or nearly.

    Raises:
      ValueError: a size is not positive, heads do not divide into kv heads, or head_dim is odd.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    max_position: int = 2048
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "mlp_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "norm_eps", "max_position"):
            _check_positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2 or (self.head_dim == 2 and self.rope.kind == "dynamic"):
            raise ValueError(f"head_dim must be even (and above 2 for dynamic rope), got {self.head_dim}")

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "LlamaConfig":
        """Read the content of a config.json, in the style of transformers 5 (rope_parameters) or before (rope_theta and
        rope_scaling).

        Raises:
          ValueError: the architecture, activation, rope type or quantization is not supported, a key is missing, or a
            value has the wrong type or is out of range; the message names it.
        """
        _check_supported(hf)
        hidden_size = _read(hf, "hidden_size", int)
        num_heads = _read(hf, "num_attention_heads", int)
        max_position = _read(hf, "max_position_embeddings", int, 2048)
        head_dim = _read(hf, "head_dim", int, None)
        if head_dim is None:
            _check_positive("num_attention_heads", num_heads)
            if hidden_size % num_heads:
                raise ValueError(
                    f"config.json has no head_dim, and hidden_size {hidden_size} is not a multiple of "
                    f"num_attention_heads {num_heads}"
                )
            head_dim = hidden_size // num_heads
        return cls(
            vocab_size=_read(hf, "vocab_size", int),
            hidden_size=hidden_size,
            mlp_size=_read(hf, "intermediate_size", int),
            num_layers=_read(hf, "num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=_read(hf, "num_key_value_heads", int, num_heads),
            head_dim=head_dim,
            norm_eps=_read(hf, "rms_norm_eps", float, 1e-6),
            max_position=max_position,
            rope=_read_rope(hf, max_position),
            attention_bias=_read(hf, "attention_bias", bool, False),
            mlp_bias=_read(hf, "mlp_bias", bool, False),
            tie_embeddings=_read(hf, "tie_word_embeddings", bool, False),
            bos_token_id=_read(hf, "bos_token_id", int, None),
            eos_token_ids=eos_token_ids(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json, in the style that every version of transformers reads."""
        eos = self.eos_token_ids
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope.theta,
            "rope_scaling": _rope_scaling(self.rope),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        }


def eos_token_ids(hf: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text by a config.json or generation_config.json: a number, a list of numbers or null.

    Raises:
      ValueError: eos_token_id is something else.
    """
    ids = hf.get("eos_token_id")
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them, got {hf['eos_token_id']!r}")
    return tuple(ids)


def _check_supported(hf: dict[str, Any]) -> None:
    architectures = hf.get("architectures") or []
    if not architectures and "model_type" not in hf:
        raise ValueError("config.json names neither architectures nor a model_type")
    if architectures not in ([], ["LlamaForCausalLM"]) or hf.get("model_type", "llama") != "llama":
        raise ValueError(
            f"config.json: architecture {architectures} of model_type {hf.get('model_type')!r} is not supported, "
            "only LlamaForCausalLM (llama)"
        )
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: activation hidden_act {hf['hidden_act']!r} is not supported, only 'silu'")
    if hf.get("quantization_config") is not None:
        raise ValueError(f"config.json: quantized weights are not supported: {hf['quantization_config']!r}")


_REQUIRED = object()


def _read(hf: dict[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """The value of a key, which must be of the kind (an integer passes as a float); absent or null is the default."""
    value = hf.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"config.json lacks {key!r}")
        return default
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"config.json: {key} must be of type {kind.__name__}, got {value!r}")
    return value


def _read_rope(hf: dict[str, Any], max_position: int) -> RopeConfig:
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"config.json: rope_scaling and rope_parameters must be objects, got {scaling!r}")
    theta = _read(scaling, "rope_theta", float, _read(hf, "rope_theta", float, 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    for holder in (hf, scaling):
        if _read(holder, "partial_rotary_factor", float, 1.0) != 1:
            raise ValueError(f"config.json: partial_rotary_factor {holder['partial_rotary_factor']} is not supported")
    if kind in ("linear", "dynamic"):
        original = max_position if kind == "dynamic" else RopeConfig.original_max_position
        return RopeConfig(
            kind=kind, theta=theta, factor=_read(scaling, "factor", float), original_max_position=original
        )
    if kind == "llama3":
        key = "original_max_position_embeddings"
        return RopeConfig(
            kind="llama3",
            theta=theta,
            factor=_read(scaling, "factor", float),
            low_freq_factor=_read(scaling, "low_freq_factor", float),
            high_freq_factor=_read(scaling, "high_freq_factor", float),
            original_max_position=_read(hf, key, int, _read(scaling, key, int, max_position)),
        )
    return RopeConfig(kind=kind, theta=theta)


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    return scaling


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
