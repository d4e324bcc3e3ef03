"""Sources of questions and answers by name."""

from importlib import import_module
from pathlib import Path
from typing import Any

from g2vlm.data.chat.fixed import FIXED_OPTIONS, FixedSamples, split_fixed
from g2vlm.data.chat.types import ChatSource, Size
from g2vlm.data.registry import option_names, unknown
from g2vlm.errors import InputError

SOURCES = {
    "jsonl": "g2vlm.data.chat.jsonl:JsonlChats",
    "spar": "g2vlm.data.chat.spar:SparChats",
    "rooms_qa": "g2vlm.data.chat.rooms:RoomsChats",
    "rooms_descriptions": "g2vlm.data.chat.descriptions:RoomDescriptions",
    "rooms_jumbled": "g2vlm.data.chat.jumbled:JumbledRooms",
    "scene_clips": "g2vlm.data.chat.clips:SceneClips",
    "correspondence_questions": "g2vlm.data.chat.correspondence:CorrespondenceQuestions",
}
NEEDS_NO_ROOT = ("rooms_qa", "rooms_descriptions", "rooms_jumbled")
SHOWS_SCENES = ("scene_clips", "correspondence_questions")
"""Their root is that of the source of scenes that they show."""


def build_chat_source(name: str, root: Path | None, view_size: Size, **options: Any) -> ChatSource:
    """A source by its name in configs.

    Args:
        name: a key of `SOURCES`.
        root: its file or folder; None for what is rendered.
        view_size: (H, W) of all views of a run, for a source that has views.
        options: arguments of the source's class, and of `FixedSamples` for a finite list of samples.

    Raises:
        InputError: unknown name or option (the nearest known one is suggested), or a root missing or not wanted.
    """
    if name not in SOURCES:
        raise unknown("source of questions", name, list(SOURCES))
    if name not in SHOWS_SCENES and (root is None) != (name in NEEDS_NO_ROOT):
        why = "it is rendered and has no folder" if root is not None else "no file or folder was given"
        raise InputError(f"cannot open source of questions  {name}", why, "check root")
    module, class_name = SOURCES[name].split(":")
    source_class = getattr(import_module(module), class_name)
    known = option_names(source_class)
    options, fixed = split_fixed(options)
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, [*(key for key in known if key != "view_size"), *FIXED_OPTIONS])
    if "view_size" in known:
        options = {"view_size": view_size, **options}
    source = source_class(**options) if root is None else source_class(Path(root), **options)
    return FixedSamples(source, **fixed) if fixed else source
