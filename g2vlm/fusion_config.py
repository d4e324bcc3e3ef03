"""What a config says about VLM-3R's fusion, in strings and numbers (`g2vlm.model.fusion`, `g2vlm.geometry_tokens`)."""

from dataclasses import dataclass
from typing import Literal, get_args

FusionInit = Literal["vlm3r", "zero"]
DropoutOn = Literal["sum", "branch"]
Scope = Literal["frame", "clip"]
TokenSource = Literal["geometric_expert", "given"]
CameraToken = Literal["decoder", "mean"]
TokenKinds = Literal["all", "camera", "patches"]


@dataclass(frozen=True)
class FusionConfig:
    """VLM-3R's fusion block and what it reads; the defaults of the block are the published ones.

    Args:
        head_dim: width of an attention head; as many heads as fit into the image tokens' width.
        init: `vlm3r`: the branch has unit variance from the first step, as released. `zero`: the branch starts at zero,
            so that the model begins as without fusion.
        norm_out: normalise the branch before it is added.
        dropout: probability in training.
        dropout_on: `sum`: drop of the image tokens and the branch together, as released; `branch`: of the branch alone.
        scope: `frame`: a frame sees its own geometry tokens; `clip`: those of all frames of its scene.
        source: `geometric_expert`: the model's own, frozen. `given`: by the caller, frame by frame.
        token_dim: width of given tokens; CUT3R's is 768. Not used for the geometric expert's.
        layer: whose hidden states are taken, from 1; -1 for the last, after its norm.
        camera: the token that stands for a view's camera: mean of the camera decoder's `features`, or of the view's
            hidden states (`mean`).
        tokens: which kinds are attended to; the paper's ablations are `camera` and `patches`.
    """

    head_dim: int = 64
    init: FusionInit = "vlm3r"
    norm_out: bool = True
    dropout: float = 0.1
    dropout_on: DropoutOn = "sum"
    scope: Scope = "frame"
    source: TokenSource = "geometric_expert"
    token_dim: int = 768
    layer: int = -1
    camera: CameraToken = "decoder"
    tokens: TokenKinds = "all"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"fusion.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"fusion.dropout is {self.dropout}; it must be in [0, 1)")
        for name in ("head_dim", "token_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"fusion.{name} is {getattr(self, name)}; it must be positive")

    def require_fits(self, width: int, num_layers: int) -> None:
        """Refuse what a model of this width and depth cannot have.

        Raises:
            ValueError: heads that do not fill the width, or a layer that does not exist.
        """
        if width % self.head_dim:
            raise ValueError(f"fusion.head_dim {self.head_dim} does not divide the image tokens' width {width}")
        if self.layer != -1 and not 1 <= self.layer <= num_layers:
            raise ValueError(f"fusion.layer is {self.layer}; allowed: 1 to {num_layers}, or -1 for the last")


_CHOICES = {
    "init": get_args(FusionInit),
    "dropout_on": get_args(DropoutOn),
    "scope": get_args(Scope),
    "source": get_args(TokenSource),
    "camera": get_args(CameraToken),
    "tokens": get_args(TokenKinds),
}
