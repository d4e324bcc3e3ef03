"""Procedural rooms: exact scenes, cameras, renderings, and the held-out set `rooms-heldout-v1`."""

from g2vlm.data.rooms.cameras import CAMERA_LAWS, Cameras
from g2vlm.data.rooms.covisibility import covisibility
from g2vlm.data.rooms.heldout_v1 import heldout
from g2vlm.data.rooms.layout import LAWS, SceneLaw, build_scene
from g2vlm.data.rooms.packing import PackedScene, pack
from g2vlm.data.rooms.render import Rendering, render
from g2vlm.data.rooms.scene import CATEGORIES, Composite, Instance, OrientedBox, Room, Scene
from g2vlm.data.rooms.source import RoomsSource

__all__ = [
    "CAMERA_LAWS",
    "CATEGORIES",
    "LAWS",
    "Cameras",
    "Composite",
    "Instance",
    "OrientedBox",
    "PackedScene",
    "Rendering",
    "Room",
    "RoomsSource",
    "Scene",
    "SceneLaw",
    "build_scene",
    "covisibility",
    "heldout",
    "pack",
    "render",
]
