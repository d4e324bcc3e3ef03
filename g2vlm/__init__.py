"""Geometry-grounded vision-language models as a library.

    import g2vlm

    model = g2vlm.load("models/g2vlm")  # load() takes the demo weights
    scene = model.reconstruct("photos/")
    scene.export("out/room")
    model.ask(scene, "How many chairs are in this room?").text

Importing the package registers its classes with transformers' Auto classes. Only the command line, which must answer
`--help` at once, leaves that to the command that needs it.
"""

import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from g2vlm.asking import Answer
    from g2vlm.config import G2VLMConfig
    from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
    from g2vlm.pipeline import Pipeline, load
    from g2vlm.processor import G2VLMProcessor
    from g2vlm.sampling import GenerationOptions
    from g2vlm.scene import Scene

__version__ = "0.1.0"

_PUBLIC = {
    "Answer": "g2vlm.asking",
    "G2VLMConfig": "g2vlm.config",
    "G2VLMForConditionalGeneration": "g2vlm.model.g2vlm",
    "G2VLMProcessor": "g2vlm.processor",
    "GenerationOptions": "g2vlm.sampling",
    "Pipeline": "g2vlm.pipeline",
    "Scene": "g2vlm.scene",
    "load": "g2vlm.pipeline",
}
__all__ = [
    "Answer",
    "G2VLMConfig",
    "G2VLMForConditionalGeneration",
    "G2VLMProcessor",
    "GenerationOptions",
    "Pipeline",
    "Scene",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'g2vlm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def _started_as_command() -> bool:
    """Whether this process is the `g2vlm` script or `python -m g2vlm`."""
    return Path(sys.argv[0]).stem == "g2vlm" or ("-m", "g2vlm") in pairwise(sys.orig_argv)


if not _started_as_command():
    import_module("g2vlm.model.g2vlm")
    import_module("g2vlm.processor")
