"""Models from folders, hub ids and preset names, and back into folders. Only safetensors is read or written."""

import json
import logging
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from g2vlm.companions import write_companions
from g2vlm.config import PRESETS, G2VLMConfig
from g2vlm.convert import g2vlm_release
from g2vlm.convert.qwen2_vl import is_qwen2_vl
from g2vlm.errors import CheckpointError, InputError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.model.loading import CONFIG, is_own_layout, own_config
from g2vlm.staging import staged_folder
from g2vlm.weights import TensorSpec, WeightFiles, cast, compare

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
DEMO_WEIGHTS = Path(__file__).parent / "assets" / "demo"
DEMO_NAME = "demo weights"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def or_demo(source: str | Path | None) -> str | Path:
    """The model asked for; None stands for the demo weights of the package, and the log says so.

    Raises:
        CheckpointError: the demo weights are wanted and absent.
    """
    if source is not None:
        return source
    if not DEMO_WEIGHTS.is_dir():
        raise CheckpointError(
            "no model was chosen, and the demo weights are absent",
            f"there is no folder {DEMO_WEIGHTS}",
            "choose a model with --model, or install the package again from a complete checkout",
        )
    log.warning("%s, trained on rendered rooms only; choose another with --model", DEMO_NAME)
    return DEMO_WEIGHTS


def inspect(path: str | Path) -> dict[str, TensorSpec]:
    """Name -> (dtype, shape) of a checkpoint's tensors, from its files' headers alone.

    Args:
        path: a folder with model.safetensors or shards and their index, or one safetensors file.

    Raises:
        CheckpointError: a file is absent, damaged, or something else than safetensors.
    """
    return WeightFiles(path).specs


def read_config(source: str | Path, revision: str | None = None) -> G2VLMConfig:
    """The config of a preset, a folder in our layout or the released one, or a hub id; arguments as in `load_model`."""
    if _is_preset(source):
        return PRESETS[str(source)]()
    folder = _local_folder(source, revision)
    return own_config(folder) if _is_own(folder) else g2vlm_release.read_config(folder)


def load_model(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> G2VLMForConditionalGeneration:
    """Load a model, in evaluation mode; a checkpoint is checked completely before any weight is allocated.

    Args:
        source: a folder in our layout or in the released one; the id `owner/name` of such a folder on the Hugging Face
            Hub (downloaded unless it is in the local cache); or a preset's name, which gives random weights.
        dtype: precision of the weights, whatever they are stored in; float32 by default. The geometry heads' output
            layers stay in float32 at least.
        device: where to put the model; the CPU by default.
        revision: the commit of a hub id, 40 hexadecimal digits.
        seed: of a preset's random weights.

    Raises:
        CheckpointError: the files are absent, damaged or of another architecture; every wrong tensor is listed.
        InputError: there is no such source.
    """
    precision = _precision(dtype)
    if _is_preset(source):
        log.warning("random weights: preset %s, seed %d", source, seed)
        model = random_model(PRESETS[str(source)](), precision, seed, str(source))
    else:
        model = _load_folder(_local_folder(source, revision), precision)
    return model if device is None else model.to(device)  # pyright: ignore[reportArgumentType]


def _load_folder(folder: Path, dtype: torch.dtype) -> G2VLMForConditionalGeneration:
    if _is_own(folder):
        return G2VLMForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    config, tensors = g2vlm_release.open_release(folder)
    state = {name: tensors.load(name) for name in tensors.specs}
    return _fill(config, state, dtype, str(folder))


def _fill(
    config: G2VLMConfig, state: dict[str, torch.Tensor], dtype: torch.dtype, name: str
) -> G2VLMForConditionalGeneration:
    model = G2VLMForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model.config.name_or_path = name  # afterwards: transformers overwrites it
    return model


def random_model(
    config: G2VLMConfig, dtype: torch.dtype | str | None = None, seed: int = 0, name: str = "random"
) -> G2VLMForConditionalGeneration:
    """A model of a config with random weights, in evaluation mode; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = G2VLMForConditionalGeneration(config).state_dict()
    return _fill(config, state, _precision(dtype), name)


def _precision(dtype: torch.dtype | str | None) -> torch.dtype:
    chosen = DTYPES.get(str(dtype or "float32").removeprefix("torch."))
    if chosen is None:
        raise InputError(f"unsupported dtype {dtype}", f"supported: {', '.join(DTYPES)}", "choose one of them")
    return chosen


def _is_preset(source: str | Path) -> bool:
    return isinstance(source, str) and source in PRESETS and not Path(source).is_dir()


def _local_folder(source: str | Path, revision: str | None) -> Path:
    """The folder itself, or a hub id's snapshot in the local cache."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not (isinstance(source, str) and HUB_ID.fullmatch(source)) or folder.exists():
        raise InputError(
            f"no model {source}",
            f"it is neither a folder, nor a preset ({', '.join(PRESETS)}), nor a hub id owner/name",
            "give the folder that holds the checkpoint's files",
        )
    if revision is None or not COMMIT.fullmatch(revision):
        log.warning("%s without revision=<40 hexadecimal digits>: its content can change unnoticed", source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=DOWNLOADED))
    except Exception as error:  # network, permission, absence: the hub's client raises many kinds
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"no folder {source}, and no such model from the hub", reason, "check the path or the id"
        ) from None


def _is_own(folder: Path) -> bool:
    """Whether a folder is in our layout, not the released one.

    Raises:
        CheckpointError: it is in neither.
    """
    if is_own_layout(folder):
        return True
    if g2vlm_release.is_release(folder):
        return False
    if is_qwen2_vl(folder):
        raise CheckpointError(
            f"{folder} holds a Qwen2-VL without geometry",
            f"model_type in {CONFIG} is qwen2_vl",
            "make an initial checkpoint: g2vlm convert SOURCE DESTINATION --geometry-encoder DINOV2",
        )
    raise CheckpointError(
        f"no G2VLM checkpoint in {folder}",
        f"there is neither {CONFIG} of model_type g2vlm (our layout) nor text_config.json with dino_config.json "
        "(the released layout)",
        "give the folder that holds the checkpoint's files",
    )


def save_model(
    model: G2VLMForConditionalGeneration,
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a model in our layout, with its tokenizer and processor: into a temporary folder, checked, then renamed.

    Args:
        model: the model.
        folder: the folder to make.
        dtype: storage precision of every weight; by default as it is.
        max_shard_size: such as "5GB"; a larger checkpoint is split.
        overwrite: replace a checkpoint folder that is not empty.

    Raises:
        InputError: the folder is taken or cannot be written.
        ResourceError: the disk is too small.
    """
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    target = None if dtype is None else _precision(dtype)
    specs = cast(specs, target)
    with staged_folder(Path(folder), overwrite, sum(spec.num_bytes for spec in specs.values())) as staging:
        state = {name: tensor.to(specs[name].dtype) for name, tensor in model.state_dict().items()}
        model.save_pretrained(staging, state_dict=state, max_shard_size=max_shard_size)
        write_companions(staging, model.config)
        if target is not None:
            _set_dtype(staging / CONFIG, target)
        compare(specs, inspect(staging)).require_complete(folder)


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    values = json.loads(config_file.read_text(encoding="utf-8"))
    values["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
