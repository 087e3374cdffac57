"""Class gradients, and Newton's method in the subspace that they span (Tuddenham et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.optim import Optimizer

from .closure import check_closure, refuse_scaled_gradients, scalar
from .processes import mean_over_processes, sum_over_processes


IGNORED = -100
"""The label that torch's and transformers' losses leave out."""
EXAMPLES = ("own", "all")
TIMES_SGD = 10
"""How many times longer than SGD's the step in a direction may be, where `damping` is left to the class."""


@dataclass(frozen=True)
class ClassGradients:
    """The class gradients of one batch, of all processes together."""

    c: Tensor  # [C, n]: class k's mean of the gradient of its logit; zero where the batch has none of the class
    weight: Tensor  # [C]: mean over the batch of y_k p_k (1 - p_k), that of class k's own examples
    weight_of_all: Tensor  # [C]: mean over the batch of p_k (1 - p_k), that of all examples
    count: Tensor  # [C]: examples of each class


def class_gradients(logits: Tensor, labels: Tensor, params: Iterable[Tensor]) -> ClassGradients:
    """c_k = 1 / |D_k| sum_{mu in D_k} grad z_k^mu (equation 1), D_k the examples of class k in the batch.

    All classes in one batched vector-Jacobian product; and the weights of c_k c_k^T in equation (3). Keeps the graph.

    Args:
        logits: [..., C], with their graph; leading dimensions (of tokens, say) are so many more examples.
        labels: Whole numbers below C, shaped as the leading dimensions; those of -100 are left out, as in the loss.
        params: Any tensors that the logits depend on, n numbers in all: the weights of a network, or theta_d.

    Raises:
        ValueError: if logits and labels do not fit each other, or the logits have no graph, or one with a hole: a
            reentrant checkpoint hides what it holds, whose gradients would be zero.
    """
    params = list(params)
    _check(logits, labels)
    _check_graph(logits)
    C = logits.shape[-1]
    labels = labels.reshape(-1)
    used = labels != IGNORED
    z, labels = logits.reshape(-1, C)[used], labels[used]
    classes = one_hot(labels, C).to(torch.promote_types(z.dtype, torch.float32))
    counts = sum_over_processes(classes.sum(0))
    # The mean of each class over all processes: their parts of it are summed.
    own_logits = (z * classes / counts.clamp_min(1)).sum(0)
    rows = torch.autograd.grad(
        own_logits,
        params,
        torch.eye(C, dtype=own_logits.dtype, device=z.device),
        retain_graph=True,
        is_grads_batched=True,
        allow_unused=True,
    )
    rows = [p.new_zeros(C, p.numel()) if row is None else row.flatten(1) for p, row in zip(params, rows, strict=True)]
    probabilities = z.detach().to(classes.dtype).softmax(-1)
    spread = probabilities * (1 - probabilities)
    own, every = (sum_over_processes(s.sum(0)) / counts.sum().clamp_min(1) for s in (classes * spread, spread))
    return ClassGradients(sum_over_processes(torch.cat(rows, 1)), own, every, counts)


class ClassGradientNewton(Optimizer):
    """Newton's method in the span of the class gradients, gradient descent in its complement (equation 6):

        theta <- theta - lr g - sum_k (1 / (lambda_k + damping) - lr) (v_k^T g) v_k,
        v_k = c_k / |c_k|,    lambda_k = mean_B[y_k p_k (1 - p_k)] |c_k|^2.

    What the poster lacks:

    - **damping**: as p_k goes to 0 or 1, lambda_k goes to 0 and 1 / lambda_k grows without bound. Left out, it is
      1 / (10 lr): along no v_k (with `gram`, along nothing) more than ten times gradient descent's step, also under a
      scheduler.
    - **gram**: (6) is Newton's step only if the v_k are orthogonal. With `gram` the eigenvectors and eigenvalues of
      H = sum_k lambda_k v_k v_k^T take the place of v_k and lambda_k, exact for any c_k, from the C x C Gram matrix of
      sqrt(lambda_k) v_k. Without it the formula stands as it is.
    - **rare classes**: the averages of v_k and of lambda_k within its class move only where the class is in the batch;
      of its own examples, lambda_k is that average times the share of the class among all so far.
    - **examples**: y_k in lambda_k counts class k's own examples alone, about a C-th of the curvature that the Hessian
      has along c_k, and Newton's step is C times too long (measured: recipes/class_gradient). With examples="all" it
      is lambda_k = mean_B[p_k (1 - p_k)] |c_k|^2; gram=False, examples="own", damping=0 is the poster.

    `average` is the rate of those exponential averages, each class's corrected for its start. A class not seen yet, or
    a direction without curvature, belongs to the complement.

    The closure returns (loss, logits, labels), without backward: logits and labels as for `class_gradients`. Gradients
    are computed here, and averaged over the processes here too, since the hooks of DDP do not run.

    State, on the first parameter: `v` [C, n]; `curvature`, `mass` and `share`, [C] each; `examples`, how many so far.

    Args:
        params: One group of tensors in float32 or float64, on one device.
        lr: Of the complement.
        average: In [0, 1); 0 is the batch alone.
        damping: Added to each lambda_k, at least 0; 0 is the poster's.
        examples: Whose p_k (1 - p_k) count in lambda_k: "all", or "own", class k's own.

    Raises:
        ValueError: if a number is out of its range, or the parameters are not one such group.
    """

    needs_closure = True
    needs_logits = True
    _step_supports_amp_scaling = True  # so that it can be refused

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
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        wrong = [p.dtype for p in params if p.dtype not in (torch.float32, torch.float64)]
        if len(self.param_groups) > 1 or wrong or len({p.device for p in params}) > 1:
            del self.param_groups[-1]
            raise ValueError(
                "ClassGradientNewton must be given one group of float32 or float64 parameters on one device, got "
                f"group {len(self.param_groups) + 1} with {sorted(map(str, set(wrong))) or 'no other dtypes'}; train "
                "the others by another optimiser."
            )

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor:
        """The loss before the step.

        Raises:
            TypeError, ValueError: without a closure, or with one that returns no (loss, logits, labels) that fit; and
                under a gradient scaler.
            FloatingPointError: if the loss or a gradient is not finite. Nothing is changed.
        """
        refuse_scaled_gradients(self)
        check_closure(closure, "ClassGradientNewton")
        (group,) = self.param_groups
        params = group["params"]
        with torch.enable_grad():
            loss, logits, labels = _outputs(closure())
            found = class_gradients(logits, labels, params)
            gradient = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        loss = mean_over_processes(loss)
        g = mean_over_processes(torch.cat([part.flatten() for part in gradient]))
        if not (loss.isfinite() and g.isfinite().all() and found.c.isfinite().all()):
            raise FloatingPointError(
                f"Loss, gradient and class gradients must be finite, the loss is {loss.item()}; nothing is changed. "
                "Go back to a checkpoint, or look at the batch."
            )
        state = self.state[params[0]]
        _average(state, found, group)
        v, curvature = _estimates(state, group)
        step = _newton(v, curvature, g, group)
        for p, part in zip(params, step.split([p.numel() for p in params]), strict=True):
            p.sub_(part.view_as(p))
        return loss


def _average(state: dict, found: ClassGradients, group: dict) -> None:
    """Move the averages of the classes that are in the batch, and the share of every class."""
    if not state:
        zeros = torch.zeros_like(found.weight)
        state.update(step=0, v=torch.zeros_like(found.c), curvature=zeros, mass=zeros.clone(), share=zeros.clone())
        state["examples"] = zeros.sum()
    if state["v"].shape != found.c.shape:
        raise ValueError(
            f"Logits and parameters must be those of the steps before, [C, n] = {list(state['v'].shape)}, got "
            f"{list(found.c.shape)}; make a new optimiser."
        )
    state["step"] += 1
    examples = found.count.sum()
    state["examples"] += examples
    share = found.count / examples.clamp_min(1)
    state["share"] += (share - state["share"]) * (examples / state["examples"].clamp_min(1))
    norm = found.c.norm(dim=1)
    weight = found.weight_of_all
    if group["examples"] == "own":
        weight = found.weight / share.clamp_min(torch.finfo(share.dtype).tiny)  # the mean within the class
    within = weight * norm.square()
    gain = torch.where(found.count > 0, 1 - group["average"], 0.0).to(norm.dtype)
    state["v"] += gain[:, None] * (found.c / _positive(norm)[:, None] - state["v"])
    state["curvature"] += gain * (within - state["curvature"])
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
        # The overlaps are scaled in double precision, or the small eigenvalues would drown in the large ones.
        eigenvalues, U = torch.linalg.eigh(root[:, None] * (v @ v.T).double() * root)
        kept = eigenvalues > len(v) * torch.finfo(v.dtype).eps * eigenvalues[-1]
        # q_i = sum_k sqrt(lambda_k) U_ki v_k / sqrt(e_i)
        q = root[:, None] * U / torch.where(kept, eigenvalues, 1.0).sqrt()
        coefficients = q @ (_gain(eigenvalues, kept, group) * (q.T @ along))
    else:
        coefficients = _gain(curvature.double(), curvature > 0, group) * along
    return lr * g + coefficients.to(v.dtype) @ v


def _gain(curvature: Tensor, kept: Tensor, group: dict) -> Tensor:
    """1 / (lambda + damping) - lr; zero where a direction is left to the complement."""
    lr, damping = group["lr"], group["damping"]
    if damping is None:
        inverse = TIMES_SGD * lr / (TIMES_SGD * lr * curvature + 1)
    else:
        inverse = 1 / torch.where(kept, curvature + damping, 1.0)
    return torch.where(kept, inverse - lr, 0.0)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


def _outputs(returned) -> tuple[Tensor, Tensor, Tensor]:
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


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim < 2 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            "`logits` must be [..., C] and `labels` [...], one class for each row, got "
            f"{list(logits.shape)} and {list(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must be whole numbers, the index of a class each, got {labels.dtype}.")
    if not logits.requires_grad:
        raise ValueError(
            "`logits` must come with their graph; do not detach them, and do not compute them in no_grad."
        )
    used = labels[labels != IGNORED]
    if used.numel() and (used.max() >= logits.shape[-1] or used.min() < 0):
        raise ValueError(
            f"`labels` must be at least 0 and below the {logits.shape[-1]} logits (or {IGNORED}, which is left out), "
            f"got {used.min().item()} to {used.max().item()}: more classes than logits; widen the last layer."
        )


def _check_graph(logits: Tensor) -> None:
    """torch itself refuses a reentrant checkpoint in `grad` only where one of the tensors lies before it."""
    open_nodes, seen = [logits.grad_fn], set()
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "Class gradients must be computed without reentrant checkpoints, which hide the parameters within; "
                "checkpoint with use_reentrant=False."
            )
        seen.add(node)
        open_nodes.extend(before for before, _ in node.next_functions)
