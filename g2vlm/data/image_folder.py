"""Plain folders of images without any ground truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g2vlm.data.frames import Frame, FrameSource, SceneFacts
from g2vlm.errors import InputError
from g2vlm.images import SUFFIXES, list_images, natural_key, read_image


class ImageFolderSource(FrameSource):
    """A folder of images is a scene; a folder of such folders is several.

    Args:
        root: either of the two. With images in it, its sub-folders are not read.
        options: those of FrameSource.
    """

    name = "images"

    def __init__(self, root: Path, **options: Any):
        super().__init__(**options)
        self.scenes = [list_images(folder) for folder in image_folders(Path(root))]

    def __len__(self) -> int:
        return len(self.scenes)

    def facts(self, scene: int) -> SceneFacts:
        """Named after the folder."""
        return SceneFacts(self.scenes[scene][0].resolve().parent.name, "images")

    def frame_names(self, scene: int) -> Sequence[str]:
        """File names in natural order."""
        return [path.name for path in self.scenes[scene]]

    def read_frame(self, scene: int, index: int) -> Frame:
        """Pixels alone."""
        path = self.scenes[scene][index]
        return Frame(path.name, read_image(path).pixels)


def image_folders(root: Path) -> list[Path]:
    """`root` if it holds images, else those of its sub-folders that do, in natural order.

    Raises:
        InputError: no image in either, or `root` is no folder.
    """
    if not root.is_dir():
        raise InputError(f"missing data folder  {root}", "there is no folder of that name", "check the spelling")
    for folders in ([root], [path for path in root.iterdir() if path.is_dir()]):
        if found := [folder for folder in folders if any(p.suffix.lower() in SUFFIXES for p in folder.iterdir())]:
            return sorted(found, key=natural_key)
    raise InputError(f"no images in  {root}", "neither there nor in its sub-folders", f"accepted: {' '.join(SUFFIXES)}")
