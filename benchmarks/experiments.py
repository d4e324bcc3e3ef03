"""What the write-ups under docs/experiments compare: configs, what scores their runs, and columns of tables."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of a table: a metric in the `results.json` of a folder, and how to print it."""

    folder: str
    metric: str
    number: str


@dataclass(frozen=True)
class Experiment:
    """Runs that are compared.

    Args:
        configs: name in the table -> config files, later ones over earlier; the first is the reference, whose baselines
            are told.
        scores: folder -> what scores a model into it, but for its model and output.
        columns: of the table.
        curve: the term of the validation that is drawn; `loss`: their sum.
    """

    configs: Mapping[str, tuple[str, ...]]
    scores: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, Column]
    curve: str = "loss"


RECON = ("eval/recon.py", "--pictures", "0")
VQA = ("eval/vqa.py", "--pictures", "0")
SUPERVISION = "configs/ablations/supervision/{}.yaml"

RECONSTRUCTION = {
    "AbsRel": Column("scores", "abs_rel", "{:.4f}"),
    "delta < 1.25": Column("scores", "delta_1", "{:.3f}"),
    "rotation, median deg": Column("scores", "rotation_median_deg", "{:.1f}"),
    "RRA @ 15 deg, %": Column("scores", "rra_15", "{:.1f}"),
    "AUC @ 30 deg, %": Column("scores", "auc_30", "{:.1f}"),
}

EXPERIMENTS = {
    "stage1": Experiment(
        configs={
            "global": ("configs/tiny_stage1.yaml",),
            "mixed": ("configs/ablations/attention_mixed.yaml",),
            "frame": ("configs/ablations/attention_frame.yaml",),
            "single encoder": ("configs/ablations/single_encoder.yaml",),
        },
        scores={"scores": RECON},
        columns=RECONSTRUCTION,
    ),
    "joint": Experiment(
        configs={
            "CE only": ("configs/tiny_stage2.yaml",),
            "CE + CE": ("configs/tiny_stage2_sr.yaml",),
            "VG + CE": ("configs/tiny_stage2_vg_ce.yaml",),
            "no geometric expert": ("configs/ablations/joint_images_alone.yaml",),
            "blind": ("configs/ablations/joint_blind.yaml",),
        },
        scores={
            "scores": RECON,
            "questions": VQA,
            "off": (*VQA, "--geometry", "off"),
            "shuffled": (*VQA, "--geometry", "shuffled"),
            "blank": (*VQA, "--images", "blank"),
        },
        columns={
            "questions, macro": Column("questions", "macro", "{:.1f}"),
            "geometry off": Column("off", "macro", "{:.1f}"),
            "shuffled": Column("shuffled", "macro", "{:.1f}"),
            "grey images": Column("blank", "macro", "{:.1f}"),
            "choices, %": Column("questions", "choice_accuracy", "{:.1f}"),
            "numbers, MRA": Column("questions", "number_mra", "{:.1f}"),
            **{name: RECONSTRUCTION[name] for name in ("AbsRel", "rotation, median deg")},
        },
        curve="language",
    ),
    "supervision": Experiment(
        configs={
            "answers alone": (SUPERVISION.format("text"),),
            **{
                name: (SUPERVISION.format("text"), SUPERVISION.format(file))
                for name, file in (
                    ("distillation", "distillation"),
                    ("GeoVR", "geovr"),
                    ("GASP", "gasp"),
                    ("SpatialSV", "spatialsv"),
                    ("all three", "all"),
                )
            },
        },
        scores={
            "matches": (
                "eval/correspondence.py",
                "--geometry",
                "off",
                "--size",
                "168",
                "--paths",
                "0",
                "--pictures",
                "0",
            ),
            "probe": ("eval/probe.py", "--geometry", "off", "--no-baselines", "--pictures", "0"),
            "questions": (*VQA, "--geometry", "off"),
        },
        columns={
            **{f"q.k {layer}": Column("matches", f"pck1/after_rotary/{layer}", "{:.1f}") for layer in range(1, 5)},
            **{f"hidden {layer}": Column("matches", f"pck1/hidden/{layer}", "{:.1f}") for layer in range(1, 5)},
            "confidence r, layer 4": Column("matches", "confidence_r/attention/4", "{:+.2f}"),
            "probe RMSE, m": Column("probe", "rmse", "{:.3f}"),
            "questions, macro": Column("questions", "macro", "{:.1f}"),
        },
        curve="language",
    ),
}
"""`stage1`: attention between views, one encoder or two (G2VLM Fig. 6); `joint`: the strategies of stage 2 (Fig. 4);
`supervision`: GeoVR, GASP and SpatialSV beside answers, by their own diagnostics (PCK@1 by layer, depth probe)."""
