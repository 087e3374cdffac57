"""Parameter groups: theta_d and what is trained beside it each want a learning rate of their own."""

from torch import nn


def parameter_groups(
    model: nn.Module, lr: float, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Groups for a torch optimiser: theta_d at `lr`, all other trainable parameters at `head_lr`.

    A freshly initialised head (`modules_to_save`) wants a rate far above that of theta_d: the pretrained weights have
    to move little and the head much. Weight decay acts on the head alone: on theta_d it would pull towards the origin.

    Args:
        head_lr: Ten times `lr` if left out.

    Raises:
        ValueError: if the model has no theta_d that trains.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    theta_d = [p for name, p in trained if ".subspace_peft_theta_d." in f".{name}"]
    head = [p for name, p in trained if ".subspace_peft_theta_d." not in f".{name}"]
    if not theta_d:
        raise ValueError("The model must have a theta_d that trains, found none; wrap it with SubspaceConfig first.")
    groups = [{"params": theta_d, "lr": lr, "weight_decay": 0.0}]
    if head:
        groups.append({"params": head, "lr": 10 * lr if head_lr is None else head_lr, "weight_decay": weight_decay})
    return groups
