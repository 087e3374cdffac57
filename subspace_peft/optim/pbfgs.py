"""P-BFGS and P+-BFGS (Li et al. 2021, section 4): BFGS on theta_d, a vector short enough for a matrix.

bfgs.py says what differs from the published code, and what the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .bfgs import quasi_newton_step
from .closure import Objective, refuse_scaled_gradients, trainable, unnamed
from .line_search import Armijo, LineSearch


CURVATURES = ("same_batch", "next_batch")
ARMIJO = Armijo(c=0.4, beta=0.55)


class PBFGS(Optimizer):
    """BFGS of one vector with a line search: theta_d <- theta_d - alpha B g (Li et al. 2021, algorithm 2).

    B, [d, d], starts as I and is updated by equation (13); `search` chooses alpha by equation (14). The closure
    clears the gradients, computes the loss, calls backward and returns the loss, as for torch's LBFGS. Trials (with
    "same_batch" those after the first) run under no_grad. There a closure may skip backward, `if
    torch.is_grad_enabled(): loss.backward()`, so that a trial costs a forward pass only. If the model has dropout or
    batch norm, wrap the closure with `repeatable`.

    State: B; `alpha` and `trials` of the last step; `updates` of B since it was last I; the number of `resets`; and
    `stuck`, how many steps in a row found nothing along the negative gradient.

    Args:
        params: theta_d alone: float32 or float64, of shape [d]. Frozen parameters beside it are passed over, so that
            `model.parameters()` of an adapted model will do.
        search: (alpha -> loss, loss, slope) -> Step or None.
        curvature: The source of g' in y = g' - g. "same_batch": the batch of g; the first trial is evaluated with
            gradients, and another evaluation follows if it fails. "next_batch": the next step, as in the paper, which
            costs no evaluation; exact if every batch is the whole data.
        lr: The unit of alpha, which a scheduler may shorten; 1 in the paper.

    Raises:
        ValueError: if `params` is not one such vector, or `curvature` is neither of the two.
    """

    needs_closure = True
    _step_supports_amp_scaling = True  # makes GradScaler set `grad_scale`, by which `step` can refuse it

    def __init__(self, params, search: LineSearch = ARMIJO, curvature: str = "same_batch", lr: float = 1.0):
        _check(curvature, lr)
        super().__init__(params, {"lr": lr, "curvature": curvature})
        self.search = search
        self._objective = Objective("PBFGS", self.param_groups[0]["params"])

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"search": self.search, "_objective": self._objective}

    def add_param_group(self, param_group: dict) -> None:
        _check_group(param_group, self.param_groups, "PBFGS")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor:
        """The loss before the step.

        Raises:
            TypeError, ValueError: without a closure, if it returns no loss or leaves no gradient, and under a gradient
                scaler.
            FloatingPointError: if the loss or the gradient at theta_d is not finite. theta_d is unchanged.
        """
        refuse_scaled_gradients(self)
        (group,) = self.param_groups
        loss = _start(self._objective, closure)
        theta_d = group["params"][0]
        quasi_newton_step(theta_d, self.state[theta_d], loss, self._objective, closure, self.search, group)
        return loss


class PPlusBFGS(Optimizer):
    """P-BFGS, plus gradient descent with momentum outside the subspace (Li et al. 2021, section 4.4):

        w <- w + P s - lr m,    m <- momentum m + g - P P^T g,    g at w before the step.

    s is added to theta_d and -lr m to the weights of the base, which train too. `weights` and `lift` come from
    `subspace_peft.adapter.full_space.full_space`. If the line search finds no step, s = 0.

    State: that of PBFGS for theta_d, and m of each weight as `momentum_buffer`.

    Args:
        params: theta_d alone, as in PBFGS.
        weights: The tensors of the base that P moves; they require gradients.
        lift: x [d] -> P x, tensors shaped as `weights`. P has orthonormal columns.
        search, curvature: As in PBFGS; with "next_batch", y includes the effect of the step outside, as in the paper.
        lr, momentum: For the part outside; alpha and gamma in the paper.

    Raises:
        ValueError: if theta_d is not such a vector, or `lift` does not fit `weights` or lacks orthonormal columns.
    """

    needs_closure = True
    _step_supports_amp_scaling = True  # makes GradScaler set `grad_scale`, by which `step` can refuse it

    def __init__(
        self,
        params,
        weights: Iterable[Tensor],
        lift: Callable[[Tensor], list[Tensor]],
        search: LineSearch = ARMIJO,
        curvature: str = "same_batch",
        lr: float = 0.01,
        momentum: float = 0.9,
    ):
        _check(curvature, lr)
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be at least 0 and below 1, got {momentum}.")
        weights = list(weights)
        super().__init__(unnamed(params), {"lr": 1.0, "curvature": curvature})  # as the weights have no names
        (theta_d,) = self.param_groups[0]["params"]
        _check_lift(theta_d, weights, lift)
        Optimizer.add_param_group(self, {"params": weights, "lr": lr, "momentum": momentum})
        self.search, self.lift = search, lift
        self._objective = Objective("PPlusBFGS", [theta_d, *weights])

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"search": self.search, "lift": self.lift, "_objective": self._objective}

    def add_param_group(self, param_group: dict) -> None:
        _check_group(param_group, self.param_groups, "PPlusBFGS")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor:
        """The loss before the step; raises the errors of PBFGS.step."""
        refuse_scaled_gradients(self)
        inside, outside = self.param_groups
        loss = _start(self._objective, closure)
        theta_d, weights = inside["params"][0], outside["params"]
        buffers = self._momentum(theta_d, weights, outside["momentum"])
        quasi_newton_step(theta_d, self.state[theta_d], loss, self._objective, closure, self.search, inside)
        for weight, buffer in zip(weights, buffers, strict=True):
            self.state[weight]["momentum_buffer"] = buffer
        torch._foreach_add_(weights, buffers, alpha=-outside["lr"])
        return loss

    def _momentum(self, theta_d: Tensor, weights: list[Tensor], momentum: float) -> list[Tensor]:
        """The next m of each weight, from the gradients at theta_d, which trials overwrite later."""
        buffers = []
        for weight, inside in zip(weights, self.lift(theta_d.grad), strict=True):
            buffer = weight.grad - inside
            previous = self.state[weight].get("momentum_buffer")
            buffers.append(buffer if previous is None else buffer.add_(previous, alpha=momentum))
        return buffers


def _start(objective: Objective, closure: Callable | None) -> Tensor:
    """The loss where a step starts; the gradients are left on the parameters."""
    loss, _ = objective(closure, gradient=True)
    finite = [parameter.grad.isfinite().all().to(loss.device) for parameter in objective.parameters]
    if not torch.stack([loss.isfinite(), *finite]).all():  # one wait of the host for the device
        raise FloatingPointError(
            f"The loss and its gradient must be finite where a step starts, the loss is {loss.item()}; nothing is "
            "changed. Go back to a checkpoint, or look at the batch."
        )
    return loss


def _check(curvature: str, lr: float) -> None:
    if curvature not in CURVATURES:
        raise ValueError(f"`curvature` must be one of {', '.join(CURVATURES)}, got {curvature!r}.")
    if not lr >= 0:
        raise ValueError(f"`lr` must not be negative, got {lr}.")


def _check_group(group: dict, groups: list[dict], name: str) -> None:
    params = group["params"] = trainable(group["params"])
    if not params:
        raise ValueError(
            f"{name} must be given theta_d alone, one vector in one group, got an empty group, such as transformers' "
            "Trainer makes for parameters without weight decay; use SubspaceTrainer, or pass optimizers=(...)."
        )
    if groups or len(params) != 1:
        raise ValueError(
            f"{name} must be given theta_d alone, one vector in one group, got {len(params)} parameters in group "
            f"{len(groups) + 1}, besides frozen ones; leave `modules_to_save` out, and name those modules in "
            "`target_modules` or train them first."
        )
    theta_d = params[0][1] if isinstance(params[0], tuple) else params[0]
    if theta_d.ndim != 1:
        raise ValueError(f"{name} must be given a vector, got shape {list(theta_d.shape)}; flatten it.")
    if theta_d.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be given a vector of float32 or float64, got {theta_d.dtype}: half precision rounds "
            "differences of gradients away; keep theta_d in float32 and use autocast."
        )


def _check_lift(theta_d: Tensor, weights: list[Tensor], lift: Callable) -> None:
    for weight in weights:
        if not weight.requires_grad or weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"`weights` must be float32 or float64 and require gradients, got a tensor of shape "
                f"{list(weight.shape)} and {weight.dtype} with requires_grad={weight.requires_grad}; take those of "
                "subspace_peft.adapter.full_space.full_space."
            )
    with torch.no_grad():
        x = torch.randn(theta_d.shape, generator=torch.Generator().manual_seed(0)).to(theta_d)
        lifted = lift(x)
    expected, shapes = ([list(tensor.shape) for tensor in tensors] for tensors in (weights, lifted))
    if shapes != expected:
        raise ValueError(f"`lift` must return tensors shaped as `weights`, {expected}, got {shapes}.")
    ratio = (sum(tensor.double().square().sum().item() for tensor in lifted) / x.double().square().sum().item()) ** 0.5
    if abs(ratio - 1) > 2e-2:
        raise ValueError(
            f"`lift` must have orthonormal columns, it stretches a vector by {ratio:.3g}; use projection='basis' "
            "with normalization='columns'."
        )
