"""Geometry tokens on disk and from teachers: what is read is what was computed, and nothing is missed in silence."""

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from g2vlm.errors import CheckpointError, InputError
from g2vlm.geometry_tokens import Clip, GeometricExpert, GeometryTokens, SomeTokens
from g2vlm.shards import MANIFEST, Shards, ShardWriter
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from g2vlm.token_cache import CachedTokens, write_tokens
from g2vlm.token_sources import TeacherTokens, build_token_source
from tests.g2vlm.chats import chat_model

MADE_BY = {"source": "expert", "preprocessing": "abc"}


def clips(count: int = 3) -> list[Clip]:
    torch.manual_seed(0)
    return [Clip(torch.rand(2, 3, 28, 42, dtype=torch.float64), f"video-{i}:0,16") for i in range(count)]


@dataclass
class Counted:
    """The expert of a model, and how often it was asked."""

    expert: GeometricExpert = field(default_factory=lambda: GeometricExpert(chat_model()))
    asked: list[str] = field(default_factory=list)

    @property
    def token_dim(self) -> int:
        return self.expert.token_dim

    def tokens(self, clip: Clip) -> GeometryTokens:
        self.asked.append(clip.name)
        return self.expert.tokens(clip)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Three clips in three shards."""
    assert write_tokens(tmp_path / "tokens", Counted(), clips(), MADE_BY, shard_bytes=1) == 3
    return tmp_path / "tokens"


def test_cached_tokens_are_the_computed_ones(kept: Path) -> None:
    source, expert = CachedTokens(kept), GeometricExpert(chat_model())
    assert source.token_dim == expert.token_dim
    for clip in clips():
        found, computed = source.tokens(clip), expert.tokens(clip)
        for one, other in zip(found.frames("frame"), computed.frames("frame"), strict=True):
            assert torch.equal(one, other)
        assert (found.grid, found.layer, found.is_metric) == (computed.grid, computed.layer, computed.is_metric)
    assert len(list(kept.glob("*.safetensors"))) == 3
    source.shards.verify()


def test_what_is_there_is_not_made_again(kept: Path) -> None:
    source = Counted()
    assert write_tokens(kept, source, clips(5), MADE_BY) == 2
    assert source.asked == [clip.name for clip in clips(5)[3:]]
    assert Shards(kept).names == [clip.name for clip in clips(5)]


def test_a_writer_that_fails_keeps_what_it_made(tmp_path: Path) -> None:
    def some() -> Any:
        yield from clips()
        raise KeyError

    with pytest.raises(KeyError):
        write_tokens(tmp_path, Counted(), some(), MADE_BY)
    assert len(CachedTokens(tmp_path).shards) == 3


def test_ablated_sources_are_kept_as_they_are(tmp_path: Path) -> None:
    write_tokens(tmp_path, SomeTokens(Counted(), "camera"), clips(1), MADE_BY, torch.bfloat16)
    (clip,) = clips(1)
    found = CachedTokens(tmp_path).tokens(clip)
    assert found.patches is None
    assert found.camera is not None
    assert found.camera.dtype == torch.bfloat16
    assert found.num_frames == 2


def test_nothing_is_missed_in_silence(kept: Path) -> None:
    source, (clip, *_) = CachedTokens(kept), clips()
    with pytest.raises(InputError, match=r"nothing of 'video-0:0,17'[\s\S]*nearest name there is 'video-0:0,16'"):
        source.tokens(Clip(clip.images, "video-0:0,17"))
    with pytest.raises(InputError, match="2 frames of 28 x 42 are kept, asked are 1 of 28 x 42"):
        source.tokens(Clip(clip.images[:1], clip.name))
    with pytest.raises(InputError, match="2 frames of 28 x 42 are kept, asked are 2 of 28 x 28"):
        source.tokens(Clip(clip.images[..., :28], clip.name))
    with pytest.raises(InputError, match="a clip without a name"):
        write_tokens(kept, Counted(), [Clip(clip.images)], MADE_BY)


def test_tokens_that_something_else_made_are_refused(kept: Path) -> None:
    other = {**MADE_BY, "preprocessing": "def"}
    with pytest.raises(InputError, match="preprocessing is 'abc', wanted 'def'"):
        CachedTokens(kept, {"preprocessing": "def"})
    with pytest.raises(InputError, match="preprocessing is 'abc', wanted 'def'"):
        write_tokens(kept, Counted(), clips(), other)
    with pytest.raises(InputError, match="dtype is 'as computed', wanted 'bfloat16'"):
        write_tokens(kept, Counted(), clips(), MADE_BY, torch.bfloat16)
    assert CachedTokens(kept, {"source": "expert"}).token_dim == 32


def test_damage_is_named(kept: Path) -> None:
    shard = kept / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"shard-00001.safetensors is damaged"):
        CachedTokens(kept).shards.verify()
    with pytest.raises(CheckpointError, match="a checksum of video-1:0,16 does not match"):
        CachedTokens(kept).tokens(clips()[1])
    CachedTokens(kept).tokens(clips()[0])
    shard.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"shard-00001.safetensors is damaged"):
        CachedTokens(kept)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"shard-00001.safetensors is missing"):
        CachedTokens(kept)
    (kept / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="not of schema 2"):
        CachedTokens(kept)
    with pytest.raises(CheckpointError, match="missing"):
        CachedTokens(kept.parent)


def test_a_shard_without_what_the_manifest_says(kept: Path) -> None:
    manifest = json.loads((kept / MANIFEST).read_text())
    names = [clip.name for clip in clips()]
    manifest["entries"][names[0]]["shard"] = "shard-00001.safetensors"
    (kept / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lacks video-0:0,16"):
        CachedTokens(kept).tokens(clips()[0])


def test_a_manifest_whose_entries_are_in_no_shard_of_it(kept: Path) -> None:
    manifest = json.loads((kept / MANIFEST).read_text())
    del manifest["shards"]["shard-00001.safetensors"]
    (kept / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"lists no shard-00001.safetensors"):
        CachedTokens(kept)


def test_another_process_opens_files_of_its_own(kept: Path) -> None:
    source, clip = CachedTokens(kept), clips()[0]
    found = source.tokens(clip)
    moved = pickle.loads(pickle.dumps(source)).tokens(clip)
    assert all(map(torch.equal, found.frames("frame"), moved.frames("frame")))


def test_what_made_tokens_is_the_same_when_it_is_asked_again(tmp_path: Path) -> None:
    for made in (1, 0):
        assert write_tokens(tmp_path, Counted(), clips(1), {"size": (28, 42)}) == made
    assert CachedTokens(tmp_path, {"size": (28, 42)}).token_dim == 32


def test_other_groups_are_no_tokens(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, {"teacher": "vggt"}) as writer:
        writer.add("a/b", {"depth": torch.ones(2)}, {})
        with pytest.raises(InputError, match="a/b is in"):
            writer.add("a/b", {}, {})
    assert torch.equal(Shards(tmp_path).load("a/b")["depth"], torch.ones(2))
    with pytest.raises(CheckpointError, match="holds no geometry tokens"):
        CachedTokens(tmp_path)


# Teachers.


TWO_BLOCKS = TeacherFeatures((1, 3), 4, 5)


@dataclass
class Features:
    """A teacher with features of two blocks."""

    features: TeacherFeatures | None = TWO_BLOCKS
    known: bool = True
    name: str = "two blocks"
    online: bool = True

    def complete(self, clip: Clip, targets: TeacherTargets | None) -> TeacherTargets | None:
        if not self.known:
            return None
        maps = {block: torch.full((2, 2, 3, 5), float(block), requires_grad=True) for block in (1, 3)}
        info = TeacherInfo(self.name, "1", (28, 42), 14)
        return TeacherTargets(2, (28, 42), info, features=maps, metric_scale=torch.tensor(1.0))


def test_a_teachers_features_are_tokens() -> None:
    (clip,) = clips(1)
    source = TeacherTokens(Features())
    tokens = source.tokens(clip)
    assert source.token_dim == 5
    assert (tokens.grid, tokens.layer, tokens.is_metric) == ((2, 3), 3, True)
    assert torch.equal(torch.stack(tokens.frames("frame")), torch.full((2, 7, 5), 3.0))
    assert not tokens.frames("frame")[0].requires_grad
    plain = TeacherTokens(Features(), block=1, camera="none").tokens(clip)
    assert plain.camera is None
    assert torch.equal(torch.stack(plain.frames("frame")), torch.full((2, 6, 5), 1.0))


def test_teachers_without_these_features() -> None:
    (clip,) = clips(1)
    with pytest.raises(InputError, match="two blocks has no features"):
        TeacherTokens(Features(features=None))
    with pytest.raises(InputError, match="no features of block 2"):
        TeacherTokens(Features(), block=2)
    with pytest.raises(InputError, match="unknown camera 'decoder'"):
        TeacherTokens(Features(), camera="decoder")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="no geometry tokens of clip 'video-0"):
        TeacherTokens(Features(known=False)).tokens(clip)


def test_sources_by_name(kept: Path) -> None:
    assert isinstance(build_token_source("cache", kept, made_by=MADE_BY), CachedTokens)
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("cash", {}, "did you mean cache"),
        ("cache", {"madeby": 1}, "did you mean made_by"),
        ("cache", {}, "no folder was given"),
        ("teacher", {"teacher": "vgg"}, "did you mean vggt"),
    ]
    for name, options, message in wrong:
        with pytest.raises(InputError, match=message):
            build_token_source(name, **options)
