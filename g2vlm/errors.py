"""What can go wrong for a user, each with what, why, what to do, and the exit code of the command line."""


class G2VLMError(Exception):
    """A failure the user can act on.

    Args:
        what: one line naming the thing that failed.
        why: one line with the cause or the place.
        fix: one line with what to do about it.
    """

    code = 70

    def __init__(self, what: str, why: str = "", fix: str = ""):
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class CheckFailed(G2VLMError):
    """The command ran, and a check it was asked to make failed."""

    code = 1


class InputError(G2VLMError, ValueError):
    """Bad input or usage; nothing was changed."""

    code = 2


class TooManyBadFiles(InputError):
    """More files of a dataset are unreadable than was allowed."""

    code = 6


class MissingExtra(G2VLMError, ImportError):
    """An optional part is not installed; `fix` names the extra."""

    code = 3


class ResourceError(G2VLMError):
    """Not enough memory or disk; `fix` names a setting that fits."""

    code = 4


class CheckpointError(G2VLMError):
    """A checkpoint that is incomplete, damaged or of another architecture."""

    code = 5
