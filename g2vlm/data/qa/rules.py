"""When a question may be asked: what must be seen, and how far answers must be from ambiguity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Thresholds of the generators; the defaults are those of VLM-3R's data for videos (metres, degrees, seconds).

    Args:
        min_share: of an image that an object covers in some view before it is named; with 0, objects need not be shown.
        uncut: an object's size is asked only when some view shows it clear of the image's border.
        angle_margin: of a direction from the border of its sector, on both sides.
        num_ordered: categories whose order of appearance is asked.
        order_gap: first appearances must differ by more than this.
        frame_gap: least and greatest number of frames between the two of a displacement.
        dominance: the camera's main direction of movement is at least this many times the other one.
    """

    min_share: float = 0.0
    uncut: bool = False
    angle_margin: float = 10.0
    num_ordered: int = 4
    order_gap: float = 1.0
    frame_gap: tuple[int, int] = (5, 30)
    dominance: float = 1.0


VIDEO = Rules()
STILLS = Rules(min_share=0.005, uncut=True, num_ordered=3, order_gap=0.0, frame_gap=(1, 30), dominance=1.5)
"""For a few views of a room in random order: half a percent of an image is 35 pixels of 84 x 84."""
