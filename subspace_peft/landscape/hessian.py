"""The loss around a point: products with its Hessian, its top eigenvectors, and how much of them a subspace covers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


Matvec = Callable[[Tensor], Tensor]


def hessian_product(loss: Callable[[], Tensor | Iterable[Tensor]], params: Iterable[Tensor]) -> Matvec:
    """v -> H v, H the Hessian of the loss in the flat vector of `params`, by double backward:

        H v = d/dw (g(w)^T v),    g = dL/dw.

    Args:
        loss: Called once for each product. Returns the loss, or yields losses whose sum is meant, such as those of the
            batches of a data set, each divided by their number: one graph is held at a time.
        params: n numbers in all, on one device. Where the network has dropout, put it in eval mode.

    Returns:
        A function of v, float [n], that returns H v in the dtype of v.
    """
    params = list(params)
    sizes = [p.numel() for p in params]

    def product(v: Tensor) -> Tensor:
        if v.shape != (sum(sizes),):
            raise ValueError(f"`v` must have one number for each of the {sum(sizes)} parameters, got {list(v.shape)}.")
        parts = [part.view_as(p).to(p) for part, p in zip(v.split(sizes), params, strict=True)]
        total = torch.zeros_like(v)
        with torch.enable_grad():
            losses = loss()
            for term in [losses] if isinstance(losses, Tensor) else losses:
                rows = _double_backward(term, params, parts)
                total += torch.cat([row.detach().flatten() for row in rows]).to(v)
        return total

    return product


def _double_backward(loss: Tensor, params: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    gradient = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    curved = [(g, part) for g, part in zip(gradient, parts, strict=True) if g is not None and g.requires_grad]
    if not curved:  # the loss is linear
        return [torch.zeros_like(p) for p in params]
    curved, parts = zip(*curved, strict=True)
    return torch.autograd.grad(curved, params, parts, allow_unused=True, materialize_grads=True)


def lanczos(
    matvec: Matvec,
    n: int,
    k: int,
    iterations: int | None = None,
    tol: float = 1e-6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The k algebraically largest eigenpairs of a symmetric matrix that is known by its products.

    Lanczos with full reorthogonalisation (Golub and Van Loan, section 10.3): after m products, with Q: [n, m] of
    orthonormal columns and T: [m, m] tridiagonal, A Q = Q T + beta_m q_{m+1} e_m^T, so that an eigenpair (theta, s) of
    T gives A's up to |A Q s - theta Q s| = beta_m |s_m|. Where beta_m is zero it goes on from a new random vector.

    Args:
        iterations: At most so many products, and n: [n, iterations] numbers are held. 10 k + 100 if left out.
        tol: Stops where the residual of all k is below tol |T|; 0 makes all iterations.
        seed: Of the start, drawn on the CPU.
        dtype: Of Q and of everything but the product itself.

    Returns:
        Eigenvalues [k], descending, and orthonormal eigenvectors [n, k].

    Raises:
        ValueError: if k is not between 1 and n, or `iterations` is below k.
        FloatingPointError: if a product is not finite.
    """
    iterations = min(n, 10 * k + 100 if iterations is None else iterations)
    if not 1 <= k <= iterations:
        raise ValueError(f"`k` must be at least 1 and at most n and `iterations`, {iterations} here, got {k}.")
    generator = torch.Generator().manual_seed(seed)
    epsilon = torch.finfo(dtype).eps
    Q = torch.empty(iterations, n, dtype=dtype, device=device)
    T = torch.zeros(iterations, iterations, dtype=torch.float64)
    Q[0] = _orthogonal_start(Q[:0], generator)
    for m in range(1, iterations + 1):
        w = matvec(Q[m - 1]).to(Q)
        if not w.isfinite().all():
            raise FloatingPointError(f"Products with the matrix must be finite, number {m} is not.")
        T[m - 1, m - 1] = torch.dot(w, Q[m - 1])
        for _ in range(2):  # once more, for what rounding left
            w -= Q[:m].T @ (Q[:m] @ w)
        beta = w.norm().item()
        eigenvalues, S = torch.linalg.eigh(T[:m, :m])
        scale = eigenvalues.abs().max().item()
        broken = beta <= 10 * epsilon * max(scale, torch.finfo(dtype).tiny)
        residual = beta * S[-1, -k:].abs().max().item()
        if m == iterations or (m >= k and not broken and residual <= tol * scale and tol > 0):
            break
        # After a breakdown there may be more eigenvectors of the same eigenvalue, which one start cannot see.
        Q[m] = _orthogonal_start(Q[:m], generator) if broken else w / beta
        T[m, m - 1] = T[m - 1, m] = 0.0 if broken else beta
    if m < n and residual > tol * scale and tol > 0:
        warnings.warn(
            f"After {m} products the residual is {residual / scale:.1e} of the largest eigenvalue, above tol = {tol}; "
            "raise `iterations`.",
            stacklevel=2,
        )
    vectors = Q[:m].T @ S[:, -k:].flip(1).to(Q)
    return eigenvalues[-k:].flip(0).to(Q), vectors


def _orthogonal_start(Q: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the rows of Q. [n]"""
    q = torch.randn(Q.shape[1], generator=generator, dtype=torch.float64).to(Q)
    for _ in range(2):
        q -= Q.T @ (Q @ q)
        q /= q.norm()
    return q


def coverage(c: Tensor, V: Tensor) -> float:
    """The share of span(V) that lies in span(c): |Q^T V|_F^2 / k, with Q and V orthonormal bases of the two.

    1 where span(c) holds span(V); for random c it is C / n on average.

    Args:
        c: [C, n], any rows, such as class gradients.
        V: [n, k], any columns, such as eigenvectors of the Hessian.

    Raises:
        ValueError: if the two do not fit, are not finite, or V is zero.
    """
    if c.ndim != 2 or V.ndim != 2 or c.shape[1] != V.shape[0]:
        raise ValueError(f"`c` must be [C, n] and `V` [n, k] with one n, got {list(c.shape)} and {list(V.shape)}.")
    if not (c.isfinite().all() and V.isfinite().all()):
        raise ValueError("`c` and `V` must be finite.")
    Q, V = _row_space(c), _row_space(V.T)
    if not len(V):
        raise ValueError("`V` must span something, it is zero.")
    return ((Q @ V.T.to(Q)).square().sum() / len(V)).item()


def _row_space(rows: Tensor) -> Tensor:
    """An orthonormal basis of the span of the rows, float64 [rank, n]; rows of any length count alike."""
    rows = rows.detach().double()
    norms = rows.norm(dim=1, keepdim=True)
    _, values, basis = torch.linalg.svd(rows / torch.where(norms > 0, norms, 1.0), full_matrices=False)
    return basis[values > 1e-6]
