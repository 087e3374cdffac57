"""The model of a run: a pretrained ViT, a new classifier, and what is trained of them.

Every PEFT method adapts the same modules, all linear ones but the classifier, and trains the classifier beside them
by `modules_to_save`, at the learning rate `head_lr`.
"""

from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from recipes.tasks.data import Split
from recipes.vit_lora.settings import Settings
from subspace_peft import SubspaceConfig


HEAD = "classifier"


def base_model(settings: Settings, training: Split, classes: int, checkpoints: Path) -> ViTForImageClassification:
    """The pretrained ViT under a new classifier that is drawn from the seed; all of it drawn, where there is no base.

    Raises:
        ValueError: if the base is neither a checkpoint nor a Hub id, or takes other images.
    """
    torch.manual_seed(settings.seed)
    channels, pixels = training.images.shape[1], settings.image_size or training.images.shape[-1]
    if not settings.base:
        return ViTForImageClassification(_shape(settings, channels, pixels, classes))
    model = ViTForImageClassification.from_pretrained(_source(settings, checkpoints))
    asked, got = (model.config.num_channels, model.config.image_size), (channels, pixels)
    if asked != got:
        raise ValueError(
            f"The images must have the channels and pixels of the base {settings.base!r}, {asked}, got {got} of "
            f"{settings.dataset}; give another `image_size`, `base` or `dataset`."
        )
    new = nn.Linear(model.config.hidden_size, classes)
    nn.init.trunc_normal_(new.weight, std=model.config.initializer_range)
    nn.init.zeros_(new.bias)
    model.classifier, model.num_labels, model.config.num_labels = new, classes, classes
    return model


def _shape(settings: Settings, channels: int, pixels: int, classes: int) -> ViTConfig:
    for whole, part in (("hidden_size", "heads"), ("image_size", "patch_size")):
        value = pixels if whole == "image_size" else settings.hidden_size
        if value % getattr(settings, part):
            raise ValueError(f"`{part}` must divide `{whole}` = {value}, got {getattr(settings, part)}; change one.")
    return ViTConfig(
        image_size=pixels,
        num_channels=channels,
        patch_size=settings.patch_size,
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_labels=classes,
    )


def _source(settings: Settings, checkpoints: Path) -> str:
    if (checkpoints / settings.base).is_dir():
        return str(checkpoints / settings.base)
    if "/" in settings.base:
        return settings.base
    raise ValueError(
        f"`base` must be a Hub id or a checkpoint in {str(checkpoints)!r}, got {settings.base!r}; run the YAML that "
        f"has `checkpoint: {settings.base}` first."
    )


def wrap(model: nn.Module, settings: Settings, steps: int) -> nn.Module:
    """The model with only the method's parameters trainable; `steps` in all, for AdaLoRA's schedule."""
    if settings.method == "full":
        return model
    if settings.method == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(HEAD))
        return model
    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != HEAD]
    return get_peft_model(model, config(settings, targets, steps))


def config(settings: Settings, targets: list[str], steps: int) -> PeftConfig:
    """alpha is the rank everywhere: an increment is BA, and what differs is how B and A are trained.

    AdaLoRA starts from half as many ranks again as it may keep, and prunes them between a tenth and seven tenths of
    the steps.
    """
    common = {"target_modules": targets, "modules_to_save": [HEAD]}
    rank = settings.rank
    if settings.method == "lora":
        return LoraConfig(r=rank, lora_alpha=rank, **common)
    if settings.method == "adalora":
        start = rank + (rank + 1) // 2
        schedule = {"tinit": steps // 10, "tfinal": 3 * steps // 10, "deltaT": max(1, steps // 100)}
        return AdaLoraConfig(
            init_r=start, target_r=rank, lora_alpha=start, total_step=max(steps, 2), **schedule, **common
        )
    return SubspaceConfig(
        d=settings.d or None,
        projection=settings.projection,
        coordinates=settings.coordinates,
        rank=rank or None,
        seed=settings.seed,
        parameters=["weight"],  # as LoRA: no biases
        **common,
    )
