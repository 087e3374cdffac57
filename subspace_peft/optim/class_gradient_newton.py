"""ClassGradientNewton: Newton's method in the span of the class gradients (Tuddenham et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .class_gradient import ClassGradients, class_gradients
from .closure import check_closure, refuse_scaled_gradients, scalar, trainable
from .processes import mean_over_processes


EXAMPLES = ("own", "all")
TIMES_SGD = 10
"""With the default damping, a step along a direction is at most this many times as long as that of SGD."""


class ClassGradientNewton(Optimizer):
    """Newton's method in the span of the class gradients, gradient descent in its complement (equation 6):

        theta <- theta - lr g - sum_k (1 / (lambda_k + damping) - lr) (v_k^T g) v_k,
        v_k = c_k / |c_k|,    lambda_k = mean_B[y_k p_k (1 - p_k)] |c_k|^2.

    It adds to the poster:

    - **damping**: as p_k approaches 0 or 1, lambda_k approaches 0 and 1 / lambda_k grows without bound. The default
      damping is 1 / (10 lr): along each v_k (with `gram`, along every direction) a step is at most ten times that of
      gradient descent, also under a scheduler.
    - **gram**: (6) is Newton's step only if the v_k are orthogonal. With `gram` the eigenvectors and eigenvalues of
      H = sum_k lambda_k v_k v_k^T replace v_k and lambda_k. They are exact for any c_k and come from the C x C Gram
      matrix of sqrt(lambda_k) v_k. Without `gram` the formula is used as it stands.
    - **rare classes**: the averages of v_k and of lambda_k within its class change only when the batch has the class.
      With examples="own", lambda_k is that average times the share of the class among all examples so far.
    - **examples**: y_k in lambda_k counts the examples of class k only, about one C-th of the curvature of the Hessian
      along c_k, so Newton's step is C times too long (measured: recipes/class_gradient). With examples="all",
      lambda_k = mean_B[p_k (1 - p_k)] |c_k|^2. The poster is gram=False, examples="own", damping=0.

    `average` is the decay rate of the exponential averages; each class's is corrected for its start. A class without
    examples so far, and a direction without curvature, belong to the complement.

    The closure returns (loss, logits, labels), without backward; logits and labels as for `class_gradients`. The
    optimiser computes the gradients and averages them over processes, because DDP's hooks do not run.

    State, on the first parameter: `v` [C, n]; `curvature`, `mass` and `share`, [C] each; `examples`, how many so far.

    Args:
        params: One group of tensors in float32 or float64, on one device. Frozen ones are passed over.
        lr: The learning rate in the complement.
        average: In [0, 1); 0 uses the batch alone.
        damping: Added to each lambda_k, at least 0; 0 in the poster.
        examples: The examples whose p_k (1 - p_k) count in lambda_k: "all", or "own" for those of class k.

    Raises:
        ValueError: if a number is out of its range, or the parameters are not one such group.
    """

    needs_closure = True
    needs_logits = True
    _step_supports_amp_scaling = True  # makes GradScaler set `grad_scale`, by which `step` can refuse it

    def __init__(
        self,
        params,
        lr: float,
        average: float = 0.9,
        damping: float | None = None,
        gram: bool = True,
        examples: str = "all",
    ):
        if not lr >= 0:
            raise ValueError(f"`lr` must not be negative, got {lr}.")
        if not 0 <= average < 1:
            raise ValueError(f"`average` must be at least 0 and below 1, got {average}.")
        if damping is not None and not damping >= 0:
            raise ValueError(f"`damping` must not be negative, got {damping}; leave it out for 1 / (10 lr).")
        if examples not in EXAMPLES:
            raise ValueError(f"`examples` must be one of {', '.join(EXAMPLES)}, got {examples!r}.")
        settings = {"lr": lr, "average": average, "damping": damping, "gram": gram, "examples": examples}
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict) -> None:
        param_group["params"] = trainable(param_group["params"])
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        others = [p.dtype for p in params if p.dtype not in (torch.float32, torch.float64)]
        if len(self.param_groups) > 1 or others or len({p.device for p in params}) > 1:
            del self.param_groups[-1]
            raise ValueError(
                "ClassGradientNewton must be given one group of float32 or float64 parameters on one device, got "
                f"group {len(self.param_groups) + 1} with {sorted(map(str, set(others))) or 'no other dtypes'}; train "
                "the others by another optimiser."
            )

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor:
        """The loss before the step.

        Raises:
            TypeError, ValueError: without a closure, if it does not return a (loss, logits, labels) that fit, and
                under a gradient scaler.
            FloatingPointError: if the loss or a gradient is not finite. Nothing is changed.
        """
        refuse_scaled_gradients(self)
        check_closure(closure, "ClassGradientNewton")
        (group,) = self.param_groups
        params = group["params"]
        with torch.enable_grad():
            loss, logits, labels = _outputs(closure())
            batch = class_gradients(logits, labels, params)
            gradient = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        loss = mean_over_processes(loss)
        g = mean_over_processes(torch.cat([part.flatten() for part in gradient]))
        if not (loss.isfinite() and g.isfinite().all() and batch.c.isfinite().all()):
            raise FloatingPointError(
                f"Loss, gradient and class gradients must be finite, the loss is {loss.item()}; nothing is changed. "
                "Go back to a checkpoint, or look at the batch."
            )
        state = self.state[params[0]]
        _average(state, batch, group)
        v, curvature = _estimates(state, group)
        step = _newton(v, curvature, g, group)
        for p, part in zip(params, step.split([p.numel() for p in params]), strict=True):
            p.sub_(part.view_as(p))
        return loss


def _average(state: dict, batch: ClassGradients, group: dict) -> None:
    """Update the averages of the classes in the batch, and the share of every class."""
    if not state:
        zeros = torch.zeros_like(batch.weight)
        state.update(step=0, v=torch.zeros_like(batch.c), curvature=zeros, mass=zeros.clone(), share=zeros.clone())
        state["examples"] = zeros.sum()
    if state["v"].shape != batch.c.shape:
        raise ValueError(
            f"Logits and parameters must be those of the steps before, [C, n] = {list(state['v'].shape)}, got "
            f"{list(batch.c.shape)}; make a new optimiser."
        )
    state["step"] += 1
    examples = batch.count.sum()
    state["examples"] += examples
    share = batch.count / examples.clamp_min(1)
    state["share"] += (share - state["share"]) * (examples / state["examples"].clamp_min(1))
    norm = batch.c.norm(dim=1)
    weight = batch.weight_of_all
    if group["examples"] == "own":
        weight = batch.weight / share.clamp_min(torch.finfo(share.dtype).tiny)  # the mean within the class
    curvature = weight * norm.square()
    gain = torch.where(batch.count > 0, 1 - group["average"], 0.0).to(norm.dtype)
    state["v"] += gain[:, None] * (batch.c / _positive(norm)[:, None] - state["v"])
    state["curvature"] += gain * (curvature - state["curvature"])
    state["mass"] += gain * (1 - state["mass"])


def _estimates(state: dict, group: dict) -> tuple[Tensor, Tensor]:
    """v_k of unit length, [C, n], and lambda_k, [C]."""
    v = state["v"] / _positive(state["v"].norm(dim=1))[:, None]
    curvature = state["curvature"] / _positive(state["mass"])
    return v, state["share"] * curvature if group["examples"] == "own" else curvature


def _newton(v: Tensor, curvature: Tensor, g: Tensor, group: dict) -> Tensor:
    """What equation (6) subtracts from theta: [n]."""
    lr = group["lr"]
    along = (v @ g).double()  # v_k^T g
    if group["gram"]:
        root = curvature.double().sqrt()
        # Scaled in double precision: otherwise rounding of the large eigenvalues would hide the small ones.
        eigenvalues, U = torch.linalg.eigh(root[:, None] * (v @ v.T).double() * root)
        positive = eigenvalues > len(v) * torch.finfo(v.dtype).eps * eigenvalues[-1]
        # q_i = sum_k sqrt(lambda_k) U_ki v_k / sqrt(e_i)
        q = root[:, None] * U / torch.where(positive, eigenvalues, 1.0).sqrt()
        coefficients = q @ (_gain(eigenvalues, positive, group) * (q.T @ along))
    else:
        coefficients = _gain(curvature.double(), curvature > 0, group) * along
    return lr * g + coefficients.to(v.dtype) @ v


def _gain(curvature: Tensor, positive: Tensor, group: dict) -> Tensor:
    """1 / (lambda + damping) - lr; zero for directions without curvature, which belong to the complement."""
    lr, damping = group["lr"], group["damping"]
    if damping is None:
        inverse = TIMES_SGD * lr / (TIMES_SGD * lr * curvature + 1)
    else:
        inverse = 1 / torch.where(positive, curvature + damping, 1.0)
    return torch.where(positive, inverse - lr, 0.0)


def _positive(x: Tensor) -> Tensor:
    """x, with 1 in place of 0, to divide by."""
    return torch.where(x > 0, x, 1.0)


def _outputs(returned) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, logits and labels that a closure returned, checked."""
    if not isinstance(returned, tuple) or len(returned) != 3 or not all(isinstance(x, Tensor) for x in returned):
        kinds = [type(x).__name__ for x in returned] if isinstance(returned, tuple) else type(returned).__name__
        raise TypeError(
            f"The closure of ClassGradientNewton must return three tensors, (loss, logits, labels), got {kinds}."
        )
    loss, logits, labels = returned
    if not loss.requires_grad:
        raise ValueError(
            "The closure of ClassGradientNewton must return loss and logits with their graph; do not detach them, and "
            "do not compute them under no_grad."
        )
    return scalar(loss, "ClassGradientNewton"), logits, labels
