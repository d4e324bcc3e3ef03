"""Sources of scenes by name."""

import difflib
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from g2vlm.data.canonical import has_scenes
from g2vlm.data.types import SceneSource
from g2vlm.errors import InputError

SOURCES = {
    "rooms": "g2vlm.data.rooms:RoomsSource",
    "canonical": "g2vlm.data.canonical:CanonicalSource",
    "seven_scenes": "g2vlm.data.seven_scenes:SevenScenesSource",
    "images": "g2vlm.data.image_folder:ImageFolderSource",
}
NEEDS_NO_ROOT = ("rooms",)


def build_source(name: str, root: Path | None = None, **options: Any) -> SceneSource:
    """A source by its name in configs.

    Args:
        name: a key of `SOURCES`.
        root: folder of the data; None for what is rendered.
        options: arguments of the source's class.

    Raises:
        InputError: unknown name or option (the nearest known one is suggested), or a root missing or not wanted.
    """
    if name not in SOURCES:
        raise unknown("data source", name, list(SOURCES))
    if (root is None) != (name in NEEDS_NO_ROOT):
        why = "it is rendered and has no folder" if root is not None else "no folder was given"
        raise InputError(f"cannot open data source  {name}", why, "check root")
    module, class_name = SOURCES[name].split(":")
    source_class = getattr(import_module(module), class_name)
    known = option_names(source_class)
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, known)
    return source_class(**options) if root is None else source_class(Path(root), **options)


def option_names(source_class: type) -> list[str]:
    """Keyword arguments of a class; `**options` are passed on to the class it derives from."""
    names: list[str] = []
    for layer in source_class.__mro__:
        if "__init__" not in vars(layer):
            continue
        parameters = list(inspect.signature(layer.__init__).parameters.values())[1:]
        names += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "root"]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def detect_source(root: Path) -> str:
    """The name of the source that reads a folder, by what lies in it.

    Raises:
        InputError: there is no such folder.
    """
    if not root.is_dir():
        raise InputError(f"missing data folder  {root}", "there is no folder of that name", "check the spelling")
    patterns = ("frame-*.pose.txt", "seq-*/frame-*.pose.txt", "*/seq-*/frame-*.pose.txt")
    if any(any(root.glob(pattern)) for pattern in patterns):
        return "seven_scenes"
    return "canonical" if has_scenes(root) else "images"


def unknown(what: str, given: str, known: list[str]) -> InputError:
    """The error about a name that is none of those known, with the nearest of them."""
    near = difflib.get_close_matches(given, known, 1)
    return InputError(
        f"unknown {what}  {given}", f"known are {', '.join(known)}", f"did you mean {near[0]}?" if near else ""
    )
