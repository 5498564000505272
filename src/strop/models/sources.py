"""Finds the folder behind a path or hub id and refuses, before anything is loaded, what strop does not open.

A model is a folder, or a GGUF file (which may lie alone in its folder); where a folder is spoken of here, and in what
is built on it, the path of such a file may stand. Refused by name: weights that are pickled, code that a model brings
along (`auto_map` for an architecture that transformers does not have itself), architectures that are not causal
language models, quantization that strop cannot read. Nothing here reads a tensor.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from strop import demo
from strop.errors import MissingInputError, ModelError, nearest
from strop.files.folders import read_json
from strop.files.gguf import is_gguf
from strop.files.gguf.reader import GgufFile
from strop.models.gguf_base import METHOD, open_gguf

TRAINED_FILE = "model.gguf"
"""The model of a run that trained on a grid which only a GGUF file holds."""

RUN_PARTS = ("best", "last", "model")
"""Where a run's folder keeps its model, in the order in which they are looked for."""

BUNDLED = "demo"
"""The name of the model that comes with strop, wherever no folder of that name lies in the way."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def find_folder(path_or_id: str | os.PathLike[str]) -> Path:
    """The folder that holds a model or an adapter: a local one, the best part of a run, or a hub id's in the local
    cache; for a GGUF file, or a folder that holds one and no other model, that file.

    Raises:
        MissingInputError: there is no such folder, and no such model on the hub or in its cache.
        ModelError: the folder holds neither a model nor an adapter nor a run.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return _model_part(path)
    if str(path_or_id) == BUNDLED:
        return demo.model_path()
    if path.exists() and is_gguf(path):
        return path
    if path.exists():
        raise MissingInputError(
            f"{path}: is a file; name the folder that holds config.json and the safetensors weights, or a GGUF file"
        )
    if _HUB_ID.fullmatch(str(path_or_id)):
        return _model_part(_from_hub(str(path_or_id)))
    raise MissingInputError(
        f"{path}: no such folder; name a model's folder, a run's folder or a hub id such as org/name"
    )


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter in PEFT's layout rather than a whole model."""
    return (folder / "adapter_config.json").is_file()


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder brings a tokenizer."""
    if is_gguf(folder) and folder.is_file():
        return GgufFile.open(folder).metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")
    return any((folder / name).is_file() for name in _TOKENIZER_FILES) or any(folder.glob("*.tiktoken"))


def read_config(folder: Path) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """The model's configuration and, apart from it, the `quantization_config` that its weights were saved with.

    Of a GGUF file whose blocks hold codes that is `{"quant_method": "gguf"}`.

    Raises:
        ModelError: no config.json, an architecture that is unknown, needs remote code or is no causal language model.
        FileFormatError: config.json is not valid JSON.
    """
    if is_gguf(folder) and folder.is_file():
        base = open_gguf(folder)
        return base.config, {"quant_method": METHOD} if base.is_quantized else None
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: holds no config.json, so it is not a model; name the folder that the model was saved in"
        )
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelError(_unknown_architecture(path, raw, model_type))
    if raw.get("transformers_weights") is not None:
        raise ModelError(
            f"{path}: transformers_weights names the file {raw['transformers_weights']!r}; only the usual names are "
            "opened: call it model.safetensors and remove the key"
        )
    quantization = raw.get("quantization_config")
    if quantization is None and (folder / "quantize_config.json").is_file():
        quantization = _of_autogptq(folder / "quantize_config.json")
    if quantization is not None and not isinstance(quantization, dict):
        raise ModelError(f"{path}: quantization_config is a {type(quantization).__name__}; an object is needed")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{path}: transformers cannot read it as {model_type}: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{path}: {model_type} is not a causal language model in transformers; strop opens those only")
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    return config, quantization or None


def _of_autogptq(path: Path) -> dict[str, Any]:
    """What AutoGPTQ wrote beside config.json before transformers had a place for it."""
    fields = {name: value for name, value in read_json(path).items() if value is not None}
    return {"quant_method": "gptq"} | fields


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something, for quoting in one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _model_part(folder: Path) -> Path:
    parts = [folder, *(folder / name for name in RUN_PARTS)]
    for part in parts:
        if (part / "config.json").is_file() or is_adapter(part):
            return part
        if part is not folder and (part / TRAINED_FILE).is_file():
            return part / TRAINED_FILE
    files = sorted(path for path in folder.iterdir() if is_gguf(path) and path.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelError(
            f"{folder}: holds {len(files)} GGUF files ({', '.join(path.name for path in files[:4])}"
            f"{', ...' if len(files) > 4 else ''}); name one of them"
        )
    raise ModelError(
        f"{folder}: holds neither config.json (a model) nor adapter_config.json (an adapter), and no "
        f"{', '.join(RUN_PARTS)} (a run) that does; name the folder that the model was saved in"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise MissingInputError(
            f"{name}: no such folder here, and the hub gave no model of that name: {first_line(error)} Check the "
            "spelling, the connection (or HF_HUB_OFFLINE), and for gated models that you are logged in"
        ) from error


def _unknown_architecture(path: Path, raw: dict[str, Any], model_type: object) -> str:
    if raw.get("auto_map"):
        return (
            f"{path}: {model_type!r} brings its own code (auto_map), which is never run; transformers has no "
            "architecture of that name. Use a model that transformers opens itself"
        )
    if model_type is None:
        return f"{path}: names no model_type; the key must hold one of transformers' architectures, such as llama"
    hint = nearest(str(model_type), list(CONFIG_MAPPING.keys()))
    return f"{path}: model_type is {model_type!r}, which this version of transformers does not know{hint}"
