"""What `g2vlm lift` does, once its arguments are parsed."""

import logging

from jsonargparse import Namespace

from g2vlm.commands import dtype_of
from g2vlm.export import check_output_folder
from g2vlm.lifting import lift as lift_scene
from g2vlm.lifting import open_heads, require_fits
from g2vlm.pipeline import load, read_sources

log = logging.getLogger(__name__)


def lift(args: Namespace) -> None:
    """Write the scene that saved heads read out of a model's hidden states."""
    check_output_folder(args.output, args.overwrite)
    sources = read_sources(args.images, args.max_views, args.skip_bad)
    heads = open_heads(args.heads, args["from"])
    pipeline = load(args.model, args.device, dtype_of(args.dtype), max_context=args.max_context)
    require_fits(heads, pipeline.chat)
    scene = lift_scene(pipeline.chat, heads, sources, args.geometry == "on", args.width)
    size = "x".join(map(str, scene.resized_to[::-1]))
    lengths = "in metres, as the heads have it" if scene.units == "metre" else "relative, of no known unit"
    log.info("lifted %d views at %s with %s: %s; lengths are %s", scene.num_views, size, heads, heads.how, lengths)
    for path in scene.export(args.output, args.formats, overwrite=args.overwrite):
        print(path)
