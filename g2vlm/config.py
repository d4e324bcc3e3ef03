"""The shape of a model: a tree of frozen dataclasses inside a transformers config, and the presets.

Every field has the value of the released 2B model as its default. Unknown keys are errors that name the nearest field.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, TypeVar, cast, get_args

from transformers import PreTrainedConfig

from g2vlm.fusion_config import FusionConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation of the geometry encoder's images."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Normalisation of the images of Qwen2-VL's and Qwen2.5-VL's towers."""

GeometryAttention = Literal["global", "block_causal", "frame", "mixed"]
Windows = Literal["official", "per_image"]
GeometricInit = Literal["random", "copy_semantic", "matching"]
MropeLayout = Literal["blocks", "interleaved"]


@dataclass(frozen=True)
class DecoderConfig:
    """The Mixture-of-Transformers decoder: two experts of equal shape that share self-attention."""

    vocab_size: int = 151936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_layers: int = 28
    num_heads: int = 12
    num_kv_heads: int = 2
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_sections: tuple[int, int, int] = (16, 24, 24)
    """Frequency slots that rotate by time, row and column; they add up to head_dim / 2."""
    mrope_layout: MropeLayout = "blocks"
    """`blocks`: the slots of time, then of rows, then of columns (Qwen2-VL, Qwen2.5-VL). `interleaved`: time, row,
    column in turn, and what is left of time at the end (Qwen3-VL)."""
    semantic_qk_norm: bool = True
    """On in the release; off when the semantic expert comes from a stock Qwen-VL."""
    geometric_qk_norm: bool = True
    geometric_layer_scale: float = 0.01
    """Initial value of the geometric expert's residual scales."""
    initializer_range: float = 0.02
    geometric_init: GeometricInit = "random"
    """How the geometric expert starts. `matching`: random, but looking for tokens that are alike (docs/adr/0005).
    `copy_semantic`: as the semantic expert, when `g2vlm convert` makes an initial checkpoint; else random."""
    residual_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the residual stream when the weights are bfloat16; float32 weights always keep float32."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mrope_sections", tuple(self.mrope_sections))
        if self.geometric_init not in get_args(GeometricInit):
            allowed = ", ".join(get_args(GeometricInit))
            raise ValueError(f"decoder.geometric_init is {self.geometric_init!r}; allowed: {allowed}")
        if self.mrope_layout not in get_args(MropeLayout):
            allowed = ", ".join(get_args(MropeLayout))
            raise ValueError(f"decoder.mrope_layout is {self.mrope_layout!r}; allowed: {allowed}")
        if sum(self.mrope_sections) * 2 != self.head_dim:
            raise ValueError(f"mrope_sections {self.mrope_sections} must add up to head_dim / 2 = {self.head_dim // 2}")
        time, rows, columns = self.mrope_sections
        if self.mrope_layout == "interleaved" and not time >= rows == columns:
            raise ValueError(f"mrope_sections {self.mrope_sections} cannot take turns: rows and columns must be equal")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")


@dataclass(frozen=True)
class VisionTowerConfig:
    """What the vision towers of all Qwen-VL models have; each architecture has its own config below."""

    image_mean: ClassVar[tuple[float, float, float]] = CLIP_MEAN
    image_std: ClassVar[tuple[float, float, float]] = CLIP_STD
    architecture: str = ""
    hidden_size: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    hidden_act: str = "quick_gelu"
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2

    def video_times(self, num_steps: int, seconds_per_step: float) -> tuple[int, ...]:
        """Temporal positions, counted from the first, of a video's `num_steps` pairs of frames.

        Args:
            num_steps: frames / temporal_patch_size.
            seconds_per_step: temporal_patch_size / frames per second; counts only where positions are in seconds.
        """
        return tuple(range(num_steps))


@dataclass(frozen=True)
class SemanticEncoderConfig(VisionTowerConfig):
    """The Qwen2-VL vision tower."""

    architecture: str = "qwen2_vl"
    mlp_ratio: int = 4


@dataclass(frozen=True)
class Qwen25VLTowerConfig(VisionTowerConfig):
    """The Qwen2.5-VL vision tower: RMS norms, SwiGLU, attention within windows in most layers."""

    architecture: str = "qwen2_5_vl"
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    window_size: int = 112
    """Side of an attention window in pixels."""
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)
    """Layers in which a whole image attends."""
    tokens_per_second: float = 2.0
    """Temporal positions per second of video."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "full_attention_layers", tuple(self.full_attention_layers))

    def video_times(self, num_steps: int, seconds_per_step: float) -> tuple[int, ...]:
        """As documented in `VisionTowerConfig`; each step's time in whole positions, rounded down."""
        interval = self.tokens_per_second * seconds_per_step
        return tuple(int(step * interval) for step in range(num_steps))


@dataclass(frozen=True)
class Qwen3VLTowerConfig(VisionTowerConfig):
    """The Qwen3-VL vision tower: learned positions resized to the image, features of several layers for the decoder.

    Its videos are sequences of images, each behind a text with its time, so that they need no temporal positions.
    """

    image_mean: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    image_std: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    architecture: str = "qwen3_vl"
    hidden_size: int = 1152
    num_layers: int = 27
    hidden_act: str = "gelu_pytorch_tanh"
    patch_size: int = 16
    intermediate_size: int = 4304
    num_positions: int = 2304
    """Entries of the square table of learned positions."""
    deepstack_layers: tuple[int, ...] = (8, 16, 24)
    """Layers whose merged features are added to the image tokens after the decoder's first layers, one each."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "deepstack_layers", tuple(self.deepstack_layers))


TOWERS = {kind().architecture: kind for kind in (SemanticEncoderConfig, Qwen25VLTowerConfig, Qwen3VLTowerConfig)}
"""Name of an architecture -> its config."""


@dataclass(frozen=True)
class GeometryEncoderConfig:
    """DINOv2 with a class token and registers."""

    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: int = 14
    image_size: int = 518
    """Side of the square images the position table was made for."""
    num_registers: int = 4
    layer_norm_eps: float = 1e-6
    layer_scale: float = 1.0
    projection_init: Literal["zero", "normal"] = "zero"
    """How the projection to the decoder's width starts; with `zero`, views differ only by position at step 0."""
    windows: Windows = "official"
    """`per_image`: each image attends within itself. `official`: the released code's windows of P tokens over the flat
    list of all images' 1 + registers + P tokens, which straddle images; the released weights were trained with them."""


@dataclass(frozen=True)
class HeadsConfig:
    """The frame-wise geometry decoders and their output layers."""

    depth: int = 5
    num_heads: int = 16
    mlp_ratio: float = 4.0
    point_dim: int = 1024
    camera_dim: int = 512
    rope_base: float = 100.0
    global_points: bool = True
    confidence: bool = False
    normals: Literal["derived", "learned"] = "derived"
    """`derived`: from the local points, without parameters. `learned`: a head on the point decoder's features."""


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens and of the fixed reconstruction prompt, looked up in the tokenizer at conversion."""

    bos: int = 151644
    eos: int = 151645
    vision_start: int = 151652
    vision_end: int = 151653
    recon_prompt: tuple[int, ...] = ()
    """Ids of "Reconstruct the 3D scene.", without bos."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "recon_prompt", tuple(self.recon_prompt))


_Part = TypeVar("_Part")


def _build(kind: type[_Part], value: _Part | Mapping[str, Any] | None, name: str) -> _Part:
    """A config part from a mapping, with unknown keys refused."""
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    known = [f.name for f in fields(kind)]  # pyright: ignore[reportArgumentType]
    values = cast(Mapping[str, Any], value)
    _refuse_unknown(values, known, f"{name}.")
    return kind(**values)


def _build_tower(value: VisionTowerConfig | Mapping[str, Any] | None) -> VisionTowerConfig:
    """The config of the named architecture; without a name, Qwen2-VL's."""
    if isinstance(value, VisionTowerConfig):
        return value
    name = (value or {}).get("architecture", SemanticEncoderConfig.architecture)
    if name not in TOWERS:
        raise ValueError(f"semantic_encoder.architecture is {name!r}; allowed: {', '.join(TOWERS)}")
    return _build(TOWERS[name], value, "semantic_encoder")


def _refuse_unknown(keys: Iterable[str], known: list[str], prefix: str) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"unknown config key {prefix}{key}{hint}")


class G2VLMConfig(PreTrainedConfig):
    """Everything needed to build a G2VLM model.

    Args:
        decoder, semantic_encoder, geometry_encoder, heads, tokens: the parts, as dataclasses or mappings.
        encoders: `dual` feeds the geometric expert from DINOv2; `single` (ablation) from the Qwen vision tower's
            patch features before its merger.
        geometry_attention: which views of a scene see each other (G2VLM section 4.3). `mixed` draws global or frame
            once per training step and is global in evaluation. `block_causal` is what the released packing does.
        semantic_image_attention: `full` as released; `causal` for models that start from a stock decoder.
        view_positions: `sequential` as released; `shared` gives all views the same positions, which makes local
            points and poses equivariant to the order of the views.
        geometry_sees: `everything` before a view as released; `views` hides text and markers from geometry tokens, so
            that training the semantic expert alone leaves every reconstruction as it is (docs/adr/0008).
        fusion: image tokens read geometry tokens before the decoder (VLM-3R); None for none.
    """

    model_type = "g2vlm"

    def __init__(
        self,
        decoder: DecoderConfig | Mapping[str, Any] | None = None,
        semantic_encoder: VisionTowerConfig | Mapping[str, Any] | None = None,
        geometry_encoder: GeometryEncoderConfig | Mapping[str, Any] | None = None,
        heads: HeadsConfig | Mapping[str, Any] | None = None,
        tokens: TokenIds | Mapping[str, Any] | None = None,
        encoders: Literal["dual", "single"] = "dual",
        geometry_attention: GeometryAttention = "global",
        semantic_image_attention: Literal["full", "causal"] = "full",
        view_positions: Literal["sequential", "shared"] = "sequential",
        geometry_sees: Literal["everything", "views"] = "everything",
        fusion: FusionConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.decoder = _build(DecoderConfig, decoder, "decoder")
        self.semantic_encoder = _build_tower(semantic_encoder)
        self.geometry_encoder = _build(GeometryEncoderConfig, geometry_encoder, "geometry_encoder")
        self.heads = _build(HeadsConfig, heads, "heads")
        self.tokens = _build(TokenIds, tokens, "tokens")
        self.encoders = encoders
        self.geometry_attention: GeometryAttention = geometry_attention
        self.semantic_image_attention = semantic_image_attention
        self.view_positions = view_positions
        self.geometry_sees = geometry_sees
        self.fusion = None if fusion is None else _build(FusionConfig, fusion, "fusion")
        _refuse_unknown(kwargs.keys(), [*_OWN_KEYS, *_TRANSFORMERS_KEYS], "")
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if self.decoder.hidden_size % self.heads.num_heads or (self.decoder.hidden_size // self.heads.num_heads) % 4:
            raise ValueError(
                f"decoder.hidden_size {self.decoder.hidden_size} / heads.num_heads {self.heads.num_heads} "
                "must be a whole multiple of 4: the heads rotate rows and columns in halves"
            )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.fusion is not None:
            self.fusion.require_fits(self.decoder.hidden_size, self.decoder.num_layers)
        tower = self.semantic_encoder
        if self.encoders == "single" and not isinstance(tower, SemanticEncoderConfig):
            raise ValueError(f"encoders: single needs a qwen2_vl tower; semantic_encoder is {tower.architecture}")
        if isinstance(tower, Qwen3VLTowerConfig) and len(tower.deepstack_layers) > self.decoder.num_layers:
            raise ValueError(
                f"semantic_encoder.deepstack_layers {tower.deepstack_layers} feed more than the decoder's "
                f"{self.decoder.num_layers} layers"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the decoder's residual stream."""
        return self.decoder.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.decoder.vocab_size

    @property
    def view_width(self) -> int:
        """Width of views in pixels when nobody asks for another: the geometry encoder's, in whole patches."""
        encoder = self.geometry_encoder
        return encoder.image_size // encoder.patch_size * encoder.patch_size

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Self:
        """This config itself: it holds the sizes that transformers looks for."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The whole config as JSON types."""
        plain = super().to_dict()
        plain.update({name: _plain(getattr(self, name)) for name in _PARTS})
        plain["fusion"] = None if self.fusion is None else _plain(self.fusion)
        return plain

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: every value of ours, so that a changed default never changes a saved model."""
        plain = self.to_dict()
        return {key: plain[key] for key in ("model_type", "architectures", "dtype", *_OWN_KEYS) if plain.get(key)}

    @classmethod
    def paper_2b(cls, **overrides: Any) -> Self:
        """The released 2B model."""
        return cls(**overrides)

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """About 90 M parameters: one GPU, hours."""
        parts: dict[str, Any] = {
            "decoder": DecoderConfig(
                vocab_size=4096,
                hidden_size=512,
                intermediate_size=1536,
                num_layers=8,
                num_heads=8,
                num_kv_heads=2,
                head_dim=64,
                mrope_sections=(8, 12, 12),
                geometric_layer_scale=1.0,
            ),
            "semantic_encoder": SemanticEncoderConfig(hidden_size=384, num_layers=6, num_heads=6),
            "geometry_encoder": GeometryEncoderConfig(
                hidden_size=384,
                num_layers=12,
                num_heads=6,
                image_size=224,
                windows="per_image",
                projection_init="normal",
            ),
            "heads": HeadsConfig(depth=3, num_heads=8, point_dim=512, camera_dim=256, normals="learned"),
            "tokens": EMBEDDED_TOKENS,
            "geometry_sees": "views",
        }
        return cls(**(parts | overrides))

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """About 4 M parameters: trains on a laptop CPU in minutes; used by the tests."""
        parts: dict[str, Any] = {
            "decoder": DecoderConfig(
                vocab_size=512,
                hidden_size=128,
                intermediate_size=384,
                num_layers=4,
                num_heads=4,
                num_kv_heads=2,
                head_dim=32,
                mrope_sections=(4, 6, 6),
                geometric_layer_scale=1.0,
            ),
            "semantic_encoder": SemanticEncoderConfig(hidden_size=64, num_layers=2, num_heads=2),
            "geometry_encoder": GeometryEncoderConfig(
                hidden_size=96,
                num_layers=4,
                num_heads=3,
                image_size=84,
                windows="per_image",
                projection_init="normal",
            ),
            "heads": HeadsConfig(depth=2, num_heads=4, point_dim=128, camera_dim=64, normals="learned"),
            "tokens": EMBEDDED_TOKENS,
            "geometry_sees": "views",
        }
        return cls(**(parts | overrides))

    @classmethod
    def smol(cls, **overrides: Any) -> Self:
        """The semantic expert has SmolLM2-135M's sizes: what `g2vlm convert` makes of that model.

        The vocabulary has two vision markers more, in a multiple of 64.
        """
        parts: dict[str, Any] = {
            "decoder": DecoderConfig(
                vocab_size=49216,
                hidden_size=576,
                intermediate_size=1536,
                num_layers=30,
                num_heads=9,
                num_kv_heads=3,
                head_dim=64,
                rms_norm_eps=1e-5,
                rope_theta=1e5,
                mrope_sections=(8, 12, 12),
                semantic_qk_norm=False,
                geometric_layer_scale=1.0,
            ),
            "semantic_encoder": SemanticEncoderConfig(hidden_size=384, num_layers=6, num_heads=6),
            "geometry_encoder": GeometryEncoderConfig(
                hidden_size=384,
                num_layers=12,
                num_heads=6,
                image_size=224,
                windows="per_image",
                projection_init="normal",
            ),
            "heads": HeadsConfig(depth=3, num_heads=9, point_dim=512, camera_dim=256, normals="learned"),
            "tokens": _SMOL_TOKENS,
            "semantic_image_attention": "causal",
            "geometry_sees": "views",
        }
        return cls(**(parts | overrides))


PRESETS = {
    "tiny": G2VLMConfig.tiny,
    "small": G2VLMConfig.small,
    "smol": G2VLMConfig.smol,
    "paper_2b": G2VLMConfig.paper_2b,
}

EMBEDDED_TOKENS = TokenIds(bos=0, eos=1, vision_start=2, vision_end=3, recon_prompt=(4, 5, 6, 7, 8, 9))
"""Ids of the tokenizer in g2vlm/assets/tokenizer, for `tiny` and `small`."""

_SMOL_PROMPT = (3733, 20546, 260, 216, 35, 52, 6621, 30)
_SMOL_TOKENS = TokenIds(bos=1, eos=2, vision_start=49152, vision_end=49153, recon_prompt=_SMOL_PROMPT)
_PARTS = ("decoder", "semantic_encoder", "geometry_encoder", "heads", "tokens")
_CHOICES = {
    "encoders": ("dual", "single"),
    "geometry_attention": ("global", "block_causal", "frame", "mixed"),
    "semantic_image_attention": ("full", "causal"),
    "view_positions": ("sequential", "shared"),
    "geometry_sees": ("everything", "views"),
}
_OWN_KEYS = [*_PARTS, *_CHOICES, "fusion"]
_TRANSFORMERS_KEYS = [
    *[f.name for f in fields(cast(Any, PreTrainedConfig))],
    "model_type", "torch_dtype", "name_or_path", "_name_or_path", "_commit_hash", "attn_implementation",
    "output_attentions", "experts_implementation",
]  # fmt: skip


def _plain(part: Any) -> dict[str, Any]:
    """A part as JSON types: tuples become lists."""
    values: dict[str, Any] = asdict(part)
    return {key: [*cast(tuple[Any, ...], v)] if isinstance(v, tuple) else v for key, v in values.items()}
