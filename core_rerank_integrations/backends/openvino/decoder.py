"""What a decoder is made of, read from its configuration: all that `graph` has to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from core_rerank_integrations.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FloatArray = npt.NDArray[np.float32]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "granite", "gemma3_text")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding: by how much a step turns each pair of a head's numbers.

    Attributes:
        frequencies: In radians, [head size / 2].
    """

    frequencies: tuple[float, ...]

    def cos_sin(self, positions: npt.NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Cosines and sines for both halves of a head, each of shape [*positions, head size]."""
        frequencies = np.array(self.frequencies, dtype=np.float32)
        angles = positions[..., None].astype(np.float32) * frequencies
        angles = np.concatenate((angles, angles), axis=-1)
        return np.cos(angles), np.sin(angles)

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any], head_size: int) -> Rotary:
        """From a configuration's ``rope_parameters``.

        Raises:
            UnsupportedModelError: They scale in a way that is not known here.
        """
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3") or (
            parameters.get("partial_rotary_factor", 1.0) != 1.0
        ):
            raise UnsupportedModelError(f"the OpenVINO backend does not know RoPE of type {kind!r}")
        exponents = np.arange(0, head_size, 2) / head_size
        frequencies = parameters["rope_theta"] ** -exponents
        if kind == "linear":
            frequencies = frequencies / parameters["factor"]
        elif kind == "llama3":
            frequencies = _stretched(frequencies, parameters)
        return cls(tuple(frequencies.tolist()))


@dataclass(frozen=True)
class Decoder:
    """A decoder of one of `MODEL_TYPES`, as far as its architectures differ.

    Attributes:
        heads: Query heads of a layer.
        key_heads: Key and value heads of a layer.
        head_size: Of queries, keys and values.
        attention_scale: Factor of the attention logits.
        embedding_scale: Factor of the token embeddings.
        residual_scale: Factor of what a block adds to the residual stream.
        norm_eps: Added to a mean of squares.
        norm_offset: Added to a norm's weights.
        activation: One of `ACTIVATIONS`.
        has_outer_norms: Whether what a block adds is normalised once more.
        windows: Per layer, how many tokens a token sees, itself included; ``None`` for all.
        rotaries: Per layer.
    """

    heads: int
    key_heads: int
    head_size: int
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    norm_eps: float
    norm_offset: float
    activation: str
    has_outer_norms: bool
    windows: tuple[int | None, ...]
    rotaries: tuple[Rotary, ...]

    @property
    def layers(self) -> int:
        """How many."""
        return len(self.windows)

    @classmethod
    def from_config(cls, config: PretrainedConfig, layers: int) -> Decoder:
        """The first ``layers`` layers of a model.

        Raises:
            UnsupportedModelError: The model is none of `MODEL_TYPES`, or has something that they
                do not usually have.
        """
        if config.model_type not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"the OpenVINO backend runs models of type {', '.join(MODEL_TYPES)}, not "
                f"{config.model_type!r}; backend='transformers' may"
            )
        is_gemma = config.model_type == "gemma3_text"
        is_granite = config.model_type == "granite"
        activation = config.hidden_activation if is_gemma else config.hidden_act
        if activation not in ACTIVATIONS:
            raise UnsupportedModelError(f"the OpenVINO backend has no activation {activation!r}")
        if getattr(config, "attn_logit_softcapping", None):
            raise UnsupportedModelError("the OpenVINO backend does not soft-cap attention logits")
        head_size = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        sliding = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or (
            ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
        )
        if unknown := set(kinds[:layers]) - {"full_attention", "sliding_attention"}:
            raise UnsupportedModelError(
                f"the OpenVINO backend knows no layers of type {', '.join(sorted(unknown))}"
            )
        parameters = config.rope_parameters
        by_kind = {
            kind: Rotary.from_parameters(parameters.get(kind, parameters), head_size)
            for kind in dict.fromkeys(kinds[:layers])
        }
        scale = head_size**-0.5
        if is_gemma:
            scale = config.query_pre_attn_scalar**-0.5
        if is_granite:
            scale = config.attention_multiplier
        return cls(
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_size=head_size,
            attention_scale=scale,
            embedding_scale=config.hidden_size**0.5
            if is_gemma
            else getattr(config, "embedding_multiplier", 1.0),
            residual_scale=getattr(config, "residual_multiplier", 1.0),
            norm_eps=config.rms_norm_eps,
            norm_offset=1.0 if is_gemma else 0.0,
            activation=activation,
            has_outer_norms=is_gemma,
            windows=tuple(
                sliding if kind == "sliding_attention" else None for kind in kinds[:layers]
            ),
            rotaries=tuple(by_kind[kind] for kind in kinds[:layers]),
        )


def openvino_runs(config: PretrainedConfig, layers: int) -> bool:
    """Whether the OpenVINO backend can run the first ``layers`` layers of a model."""
    try:
        Decoder.from_config(config, layers)
    except UnsupportedModelError:
        return False
    return True


def _stretched(
    frequencies: npt.NDArray[np.float64], parameters: dict[str, Any]
) -> npt.NDArray[np.float64]:
    """Llama 3.1's scaling: slow angles are slowed down, fast ones kept, those between blended."""
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    kept: npt.NDArray[np.float64] = np.clip((turns - low) / (high - low), 0, 1)
    stretched: npt.NDArray[np.float64] = frequencies * (kept + (1 - kept) / factor)
    return stretched
