"""Which student layers a teacher's blocks are compared with."""

from collections.abc import Sequence


def proportional_layers(teacher_blocks: Sequence[int], teacher_depth: int, student_depth: int) -> tuple[int, ...]:
    """The student's hidden states at the same relative depth as the teacher's blocks (GeoVR's released code).

    Block i of N is the state round((i + 1) / N * L), half to even, in floating point. Hidden states are counted as
    transformers does: 0 is the embedding, l the output of block l - 1, L that of the last block after the final norm.

    Args:
        teacher_blocks: counted from 0.
        teacher_depth: N, the teacher's number of blocks.
        student_depth: L, the student's number of blocks.

    Returns:
        One index in [0, L] for each block.

    Raises:
        ValueError: a block is not in [0, N).
    """
    outside = [block for block in teacher_blocks if not 0 <= block < teacher_depth]
    if outside:
        raise ValueError(f"teacher_blocks: {outside} are not blocks of a teacher that has {teacher_depth}")
    return tuple(round((block + 1) / teacher_depth * student_depth) for block in teacher_blocks)
