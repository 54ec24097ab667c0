"""The parts of a decoder, read from its configuration."""

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
    """A rotary embedding.

    Attributes:
        frequencies: Rotation per position of each pair of numbers, in radians, [head size / 2].
    """

    frequencies: tuple[float, ...]

    def cos_sin(self, positions: npt.NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Compute cosines and sines for both halves of a head, each [*positions, head size]."""
        frequencies = np.array(self.frequencies, dtype=np.float32)
        angles = positions[..., None].astype(np.float32) * frequencies
        angles = np.concatenate((angles, angles), axis=-1)
        return np.cos(angles), np.sin(angles)

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any], head_size: int) -> Rotary:
        """Read a configuration's ``rope_parameters``.

        Raises:
            UnsupportedModelError: The RoPE type is not supported.
        """
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3") or (
            parameters.get("partial_rotary_factor", 1.0) != 1.0
        ):
            raise UnsupportedModelError(
                f"the OpenVINO backend does not support RoPE of type {kind!r}"
            )
        exponents = np.arange(0, head_size, 2) / head_size
        frequencies = parameters["rope_theta"] ** -exponents
        if kind == "linear":
            frequencies = frequencies / parameters["factor"]
        elif kind == "llama3":
            frequencies = _llama3_scaled(frequencies, parameters)
        return cls(tuple(frequencies.tolist()))


@dataclass(frozen=True)
class Decoder:
    """The properties in which decoders of `MODEL_TYPES` differ.

    Attributes:
        heads: Number of query heads of a layer.
        key_heads: Number of key and value heads of a layer.
        head_size: Size of queries, keys and values.
        attention_scale: Factor of the attention logits.
        embedding_scale: Factor of the token embeddings.
        residual_scale: Factor of a block's output before it is added to the residual stream.
        norm_eps: Added to the mean of squares in a norm.
        norm_offset: Added to the weights of a norm.
        activation: One of `ACTIVATIONS`.
        has_outer_norms: Whether a block's output is normalised too.
        windows: Sliding window of each layer in tokens, including the token itself; ``None`` for
            full attention.
        rotaries: Rotary embedding of each layer.
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
        """Number of layers."""
        return len(self.windows)

    @classmethod
    def from_config(cls, config: PretrainedConfig, layers: int) -> Decoder:
        """Read the configuration of a model's first ``layers`` layers.

        Raises:
            UnsupportedModelError: The model is not of `MODEL_TYPES`, or has a feature that the
                graph does not have.
        """
        if config.model_type not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"the OpenVINO backend runs models of type {', '.join(MODEL_TYPES)}, not "
                f"{config.model_type!r}; try backend='transformers'"
            )
        if getattr(config, "quantization_config", None):
            raise UnsupportedModelError(
                "the OpenVINO backend reads plain weights, not those of a quantised checkpoint; "
                "use the model's original checkpoint, or backend='transformers'"
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
                f"the OpenVINO backend does not support layers of type {', '.join(sorted(unknown))}"
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
    """Return whether the OpenVINO backend can run the first ``layers`` layers of a model."""
    try:
        Decoder.from_config(config, layers)
    except UnsupportedModelError:
        return False
    return True


def _llama3_scaled(
    frequencies: npt.NDArray[np.float64], parameters: dict[str, Any]
) -> npt.NDArray[np.float64]:
    """Apply Llama 3.1's scaling: low frequencies are divided, high ones kept, others blended."""
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    rotations = parameters["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    kept: npt.NDArray[np.float64] = np.clip((rotations - low) / (high - low), 0, 1)
    scaled: npt.NDArray[np.float64] = frequencies * (kept + (1 - kept) / factor)
    return scaled
