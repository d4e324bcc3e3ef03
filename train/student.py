"""What a run needs of a model, whatever its kind: ours, or a stock one of transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from g2vlm.data.types import SceneSource
from g2vlm.errors import InputError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.stock.layout import StockLayout
from g2vlm.stock.model import image_rule, load_processor
from g2vlm.supervision.backbones import Backbone
from g2vlm.supervision.base import SupervisedModel, Supervision
from train.config import RunConfig
from train.engine import Engine
from train.feed import Feed, build_feed
from train.objectives.supervision import SupervisionParts
from train.packing import ChatMixture, PackStream
from train.state import OURS, ModelFiles
from train.stock.batch import padded
from train.stock.feed import StockDataset, StockFeed
from train.stock.model import GROUPS as STOCK_GROUPS
from train.stock.model import StockFiles, recompute_activations
from train.tokens import GivenTokens, given_tokens
from train.trainable import GROUPS, checkpoint_activations


class Student(Protocol):
    """A model and how it is trained."""

    @property
    def model(self) -> Any:
        """The plain model: what is exported."""
        ...

    @property
    def groups(self) -> Mapping[str, str]:
        """Trainable group -> pattern that the names of its parameters start with."""
        ...

    @property
    def files(self) -> ModelFiles:
        """How it lies in a folder."""
        ...

    @property
    def watched(self) -> nn.Module | None:
        """The decoder whose attention is measured; None where nothing is."""
        ...

    def whole(self, backbone: Backbone, supervision: Mapping[str, Supervision]) -> nn.Module:
        """What an engine wraps: the model with what supervises it."""
        ...

    def recompute(self) -> None:
        """Recompute activations in backward."""
        ...

    def tokens(self, config: RunConfig, device: torch.device) -> GivenTokens | None:
        """The geometry tokens that it is given; errors as of `given_tokens`."""
        ...

    def feed(
        self,
        config: RunConfig,
        source: SceneSource | ChatMixture,
        engine: Engine,
        seed: int,
        varied: bool = True,
        supervision: SupervisionParts | None = None,
        tokens: GivenTokens | None = None,
    ) -> Feed:
        """What it trains or validates on; arguments and errors as of `build_feed`."""
        ...


@dataclass(frozen=True, eq=False)
class OurStudent:
    """Our own model."""

    model: G2VLMForConditionalGeneration
    files: ModelFiles = OURS

    @property
    def groups(self) -> Mapping[str, str]:
        """Experts, encoders and heads."""
        return GROUPS

    @property
    def watched(self) -> nn.Module:
        """Its decoder."""
        return self.model.decoder

    def whole(self, backbone: Backbone, supervision: Mapping[str, Supervision]) -> nn.Module:
        """The model itself where nothing supervises it."""
        return SupervisedModel(backbone, supervision) if supervision else self.model

    def recompute(self) -> None:
        """Of every block."""
        checkpoint_activations(self.model)

    def tokens(self, config: RunConfig, device: torch.device) -> GivenTokens | None:
        """Those that its fusion reads."""
        return given_tokens(config, self.model.config, device)

    def feed(
        self,
        config: RunConfig,
        source: SceneSource | ChatMixture,
        engine: Engine,
        seed: int,
        varied: bool = True,
        supervision: SupervisionParts | None = None,
        tokens: GivenTokens | None = None,
    ) -> Feed:
        """Scenes, or packs of questions."""
        return build_feed(config, source, self.model, engine, seed, varied, supervision, tokens)


@dataclass(frozen=True, eq=False)
class StockStudent:
    """A stock Qwen-VL of transformers.

    Args:
        model: as `load_stock` gives it.
        folder: that it was loaded from.
    """

    model: Any
    folder: Path
    watched: None = None

    @property
    def groups(self) -> Mapping[str, str]:
        """Language model, vision encoder and what joins them."""
        return STOCK_GROUPS

    @property
    def files(self) -> ModelFiles:
        """Those of the folder with other weights."""
        return StockFiles(self.folder)

    def whole(self, backbone: Backbone, supervision: Mapping[str, Supervision]) -> nn.Module:
        """Always in a backbone, which gives the logits of the answers alone."""
        return SupervisedModel(backbone, supervision)

    def recompute(self) -> None:
        """As the model does it."""
        recompute_activations(self.model)

    def tokens(self, config: RunConfig, device: torch.device) -> None:
        """None: it has no fusion."""
        if config.geometry_tokens is not None:
            raise InputError("geometry_tokens with a stock model", "it has no fusion that reads them", "leave them out")

    def feed(
        self,
        config: RunConfig,
        source: SceneSource | ChatMixture,
        engine: Engine,
        seed: int,
        varied: bool = True,
        supervision: SupervisionParts | None = None,
        tokens: GivenTokens | None = None,
    ) -> Feed:
        """Questions in rows; nothing of them is varied."""
        chat = config.data.chat
        if chat is None or not isinstance(source, ChatMixture):
            raise InputError("a stock model learns from questions", f"{self.folder} is one", "give data.chat.sources")
        processor = load_processor(self.folder, self.model.config)
        probes = (False, False) if supervision is None else supervision.probes
        layout = StockLayout(processor, image_rule(processor, chat.images), *probes)
        stream = PackStream(source, layout, seed, chat.tokens_per_pack, chat.view_size, size=padded)
        offline, online = (None, None) if supervision is None else (supervision.offline, supervision.online)
        dataset = StockDataset(stream, offline, clips=bool(online))
        return StockFeed(dataset, engine.rank, engine.world, online, limits=chat.images is not None)
