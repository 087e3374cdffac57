"""What each method trains: PEFT's methods at a given number of parameters, ours, and the baselines.

Every adapter adapts the same linear modules and trains the head beside them by `modules_to_save`. What this file does
not set is PEFT's default.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

from peft import (
    FourierFTConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
)
from torch import nn

from recipes.pretrained.settings import WITHOUT_ADAPTER, Settings
from subspace_peft import SubspaceConfig


HEAD = "classifier"
OF_WORDS = "language_model.lm_head"
"""The output embedding of a language model, which no adapter adapts, as in PEFT."""
OF_CONVOLUTIONS = ("subspace", "lora", "lokr")
Modules = dict[str, nn.Linear | nn.Conv2d]


def wrap(model: nn.Module, settings: Settings, basis: Path | None = None) -> nn.Module:
    """The model with only the method's parameters and the head trainable.

    Args:
        basis: The file with the columns of a `basis`.
    """
    if settings.method == "full":
        return model
    if settings.method in WITHOUT_ADAPTER:
        for name, parameter in model.named_parameters():
            chosen = settings.method == "bitfit" and name.endswith("bias")
            parameter.requires_grad_(chosen or (settings.method != "none" and name.startswith(HEAD)))
        if settings.method == "bitfit" and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"`method` 'bitfit' trains biases, and {settings.model} has none; take another.")
        return model
    modules = adapted(model, settings.modules)
    heads = [HEAD] if hasattr(model, HEAD) else None
    return get_peft_model(model, config(settings, modules, basis, heads))


def adapted(model: nn.Module, pattern: str) -> Modules:
    """The linear modules and convolutions, but the head, in whose names the regular expression is found.

    Raises:
        ValueError: if there are none.
    """
    beside = (HEAD, OF_WORDS)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in beside}
    modules = {name: m for name, m in linear.items() if re.search(pattern, name)}
    if not modules:
        raise ValueError(
            "`modules` must be found in the name of a linear module or convolution, got "
            f"{pattern!r}; one is {next(iter(linear))!r}."
        )
    return modules


def config(settings: Settings, modules: Modules, basis: Path | None, heads: list[str] | None) -> PeftConfig:
    """Of an adapter of these modules, with the new heads that train beside it.

    Raises:
        ValueError: if one of them is none that the method takes, or the method cannot have this size.
    """
    others = [name for name, module in modules.items() if not isinstance(module, nn.Linear)]
    if others and settings.method not in OF_CONVOLUTIONS:
        raise ValueError(
            f"`method` must be one of {', '.join(OF_CONVOLUTIONS)} for convolutions, such as {others[0]!r}, got "
            f"{settings.method!r}; name linear modules in `modules`."
        )
    common = {"target_modules": list(modules), "modules_to_save": heads}
    if settings.method == "subspace":
        vectors = {"target_modules": "all", "parameters": "vectors"}
        moved = vectors if settings.parameters == "vectors" else {"parameters": ["weight"]}  # as LoRA: no biases
        return SubspaceConfig(
            d=settings.d or None,
            projection=settings.projection,
            coordinates=settings.coordinates,
            rank=settings.rank or None,
            seed=settings.seed,
            basis=None if basis is None else str(basis),
            save_projection=None if basis is None else False,  # tasks share the file
            **common | moved,
        )
    kind, choices = PEFT[settings.method]
    return kind(**choices(settings, modules), **common)


def _lora(settings: Settings, modules: Modules) -> dict[str, object]:
    return {"r": settings.rank, "lora_alpha": settings.rank}


def _lokr(settings: Settings, modules: Modules) -> dict[str, object]:
    return {"r": settings.rank, "alpha": settings.rank}


def _vera(settings: Settings, modules: Modules) -> dict[str, object]:
    return {"r": settings.rank, "projection_prng_key": settings.seed}


def _unilora(settings: Settings, modules: Modules) -> dict[str, object]:
    return {"r": settings.rank, "theta_d_length": settings.d, "proj_seed": settings.seed}


def _frequencies(settings: Settings, modules: Modules) -> dict[str, object]:
    """FourierFT and WaveFT: as many of every module."""
    _check_least(settings, len(modules), "one for each module")
    return {"n_frequency": settings.d // len(modules), "random_loc_seed": settings.seed}


def _tinylora(settings: Settings, modules: Modules) -> dict[str, object]:
    """A vector for each module, or one for all where d is too small; r by r is the matrix that it is projected to."""
    tied = settings.d < len(modules)
    u = settings.d if tied else settings.d // len(modules)
    return {
        "u": u,
        "r": max(2, math.ceil(math.sqrt(settings.d / len(modules)))),
        "weight_tying": float(tied),
        "projection_seed": settings.seed,
    }


def _vblora(settings: Settings, modules: Modules) -> dict[str, object]:
    """Vectors as long as the sides of all modules allow, and the logits that choose two of them for each part."""
    sides = [(module.in_features, module.out_features) for module in modules.values()]
    length = math.gcd(*(side for pair in sides for side in pair))
    a_vector = length + sum(sum(pair) // length for pair in sides)
    _check_least(settings, 2 * a_vector, "two vectors and their logits")
    return {"r": 1, "num_vectors": settings.d // a_vector, "vector_length": length, "topk": 2}


def _check_least(settings: Settings, least: int, words: str) -> None:
    if settings.d < least:
        raise ValueError(f"`d` must be at least {least} for {settings.label}, {words}, got {settings.d}; raise it.")


PEFT: dict[str, tuple[type[PeftConfig], Callable[[Settings, Modules], dict[str, object]]]] = {
    "lora": (LoraConfig, _lora),
    "lokr": (LoKrConfig, _lokr),
    "vera": (VeraConfig, _vera),
    "fourierft": (FourierFTConfig, _frequencies),
    "waveft": (WaveFTConfig, _frequencies),
    "vblora": (VBLoRAConfig, _vblora),
    "unilora": (UniLoraConfig, _unilora),
    "tinylora": (TinyLoraConfig, _tinylora),
}
