"""Every setting's name, whose it is, and the names that other trainers give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel

from strop.config.settings import (
    Distillation,
    Epochs,
    Full,
    Lora,
    Machine,
    Minutes,
    Optimization,
    Qat,
    QatLora,
    QLora,
    Samples,
    Serving,
    Settings,
    Steps,
    Watch,
)

SHAPE: Final = ("rank", "alpha", "targets", "rank_stabilised")  # what an existing adapter has decided already
TOP: Final = ("model", "data", "output", "seed", "resume")
METHODS: Final[Mapping[str, type[Settings]]] = {
    "full": Full, "lora": Lora, "qlora": QLora, "qat": Qat, "qat-lora": QatLora,
}  # fmt: skip
LENGTHS: Final[Mapping[str, type[Settings]]] = {"max_steps": Steps, "epochs": Epochs, "minutes": Minutes}
GROUPS: Final[Mapping[str, type[Settings]]] = dict(
    samples=Samples,
    optimization=Optimization,
    distillation=Distillation,
    serving=Serving,
    watch=Watch,
    machine=Machine,
)
DEFAULT_METHOD: Final = "lora"

OTHER_NAMES: Final[Mapping[str, str]] = {
    "model": "base_model model_name_or_path model_name",
    "data": "dataset data_path dataset_name train_file",
    "output": "output_dir",
    "method": "finetuning_type fine_tune_type",
    "rank": "lora_r lora_rank r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "lora_target lora_target_modules target_modules",
    "rank_stabilised": "use_rslora",
    "adapter": "adapter_name_or_path resume_adapter_file",
    "max_steps": "iters",
    "epochs": "num_train_epochs num_epochs",
    "max_length": "cutoff_len max_seq_length max_seq_len sequence_len",
    "packing": "sample_packing",
    "chat_template": "template",
    "valid_fraction": "val_size val_set_size",
    "learning_rate": "lr",
    "optimizer": "optim",
    "schedule": "lr_scheduler_type lr_scheduler",
    "clip_norm": "max_grad_norm",
    "batch_size": "per_device_train_batch_size micro_batch_size",
    "accumulation": "gradient_accumulation_steps grad_accumulation_steps",
    "teacher": "teacher_model teacher_model_name_or_path",
    "eval_steps": "steps_per_eval",
    "save_steps": "save_every",
    "patience": "early_stopping_patience",
    "checkpointing": "gradient_checkpointing grad_checkpoint",
    "dtype": "compute_dtype torch_dtype",
    "seed": "random_seed",
}
ALIASES: Final[Mapping[str, str]] = {other: key for key, names in OTHER_NAMES.items() for other in names.split()}
"""Names that other trainers use, with ours."""


def fields_of(group: type[BaseModel]) -> list[str]:
    """The flat keys of a group."""
    return [name for name in group.model_fields if name != "name"]


def _owners() -> dict[str, str]:
    """Every flat key with the words that say whose it is."""
    owners = {name: "" for name in (*TOP, "method", *LENGTHS)}
    owners |= {name: "" for group in GROUPS.values() for name in fields_of(group)}
    for method, group in METHODS.items():
        for name in fields_of(group):
            owners[name] = f"{owners[name]}, {method}" if owners.get(name) else method
    return owners


KEYS: Final[Mapping[str, str]] = _owners()
"""Every setting's canonical name, with the methods that have it (empty: all of them)."""
