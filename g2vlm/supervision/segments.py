"""Where probe tokens stand in the segments of a sample of our own model."""

from dataclasses import replace

from g2vlm.sequence import Sample, Segment, SemanticImage, SemanticVideo


def with_probes(sample: Sample, camera: bool, scale: bool) -> list[Segment]:
    """A sample with a camera token after every frame of its images and videos, and one for its scale after the last.

    They lie in the image block that they close, so the rule of its attention is theirs.
    """
    segments: list[Segment] = []
    shown = [i for i, segment in enumerate(sample) if isinstance(segment, SemanticImage | SemanticVideo)]
    for i, segment in enumerate(sample):
        closing = int(scale and i in shown[-1:])
        if isinstance(segment, SemanticImage):
            segments.append(replace(segment, probes=camera + closing))
        elif isinstance(segment, SemanticVideo):
            counts = (int(camera),) * (len(segment.times) - 1)
            segments.append(replace(segment, probes=(*counts, camera + closing)))
        else:
            segments.append(segment)
    return segments
