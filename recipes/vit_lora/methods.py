"""The model of a run: a pretrained ViT, a new classifier, and what is trained of them.

Every PEFT method adapts the same modules, all linear ones but the classifier, and trains the classifier beside them
by `modules_to_save`, at the learning rate `head_lr`.
"""

import hashlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
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


def digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits for all weights but the classifier's: which pretraining a result comes from."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(HEAD):
            total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:12]


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


def groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Of AdamW: what the method trains at `lr`, the classifier at `head_lr`; no weight decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if HEAD in name.split(".")]
    rest = [p for name, p in trained.items() if HEAD not in name.split(".")]
    both = [{"params": rest, "lr": settings.lr}, {"params": head, "lr": settings.head_lr}]
    return [group | {"weight_decay": 0.0} for group in both if group["params"]]


def trainable(model: nn.Module) -> dict[str, int]:
    """How many numbers are trained: of the classifier, and of all else."""
    count = {"adapter": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            count["head" if HEAD in name.split(".") else "adapter"] += parameter.numel()
    return count


def saved(model: nn.Module, settings: Settings, base: nn.Module, inputs: Tensor, folder: Path | None) -> dict:
    """Bytes of the file that a user would keep, the classifier in it; for adapters, what a reload changes.

    Args:
        base: The model before it was trained, to load the adapter into.
        folder: Where the file stays; None: it does not.
    """
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        # AdaLoRA may leave a layer no rank, and files its ranks under names of its own: PEFT warns of both
        warnings.filterwarnings("ignore", ".* LoRA tensor\\(s\\) have invalid shape")
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
        path = folder or Path(temporary)
        path.mkdir(parents=True, exist_ok=True)
        if settings.method == "head":
            save_file(model.classifier.state_dict(), path / "classifier.safetensors")
        elif settings.method == "full":
            model.save_pretrained(path)
        else:
            model.save_pretrained(path, save_embedding_layers=False)
        proof = {"bytes": sum(file.stat().st_size for file in path.glob("*.safetensors"))}
        if isinstance(model, PeftModel):
            loaded = PeftModel.from_pretrained(base, path).to(inputs.device).eval()
            with torch.no_grad():
                difference = model.eval()(pixel_values=inputs).logits - loaded(pixel_values=inputs).logits
            proof["max_difference"] = difference.abs().max().item()
    return proof
