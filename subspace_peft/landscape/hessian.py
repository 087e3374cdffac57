"""The Hessian of the loss at a point: products, top eigenvectors, and how much of them a subspace covers."""

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
        loss: Called once for each product. It returns the loss, or yields losses to add up, such as those of the
            batches of a data set, each divided by their number; then only one graph is held at a time.
        params: n entries in all, on one device. Put a network with dropout in eval mode.

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
    """The k algebraically largest eigenpairs of a symmetric matrix that is given by its products with vectors.

    Lanczos with full reorthogonalisation (Golub and Van Loan, section 10.3). After m products, with orthonormal
    columns Q: [n, m] and tridiagonal T: [m, m], A Q = Q T + beta_m q_{m+1} e_m^T. So an eigenpair (theta, s) of T is
    one of A up to |A Q s - theta Q s| = beta_m |s_m|. If beta_m is zero, q_{m+1} is a new random vector.

    Args:
        iterations: The largest number of products; [n, iterations] numbers are held. min(n, 10 k + 100) if left out.
        tol: It stops when the residual of all k is below tol |T|; 0 makes all iterations. Eigenvalues that differ by
            less than tol |T| may count as one, and a smaller one as the next.
        seed: For the random vectors, which are drawn on the CPU.
        dtype: For Q and everything but the product itself.

    Returns:
        Eigenvalues [k], descending, and orthonormal eigenvectors [n, k].

    Raises:
        ValueError: if k is not between 1 and n, or `iterations` is below k.
        FloatingPointError: if a product is not finite.
    """
    iterations = min(n, 10 * k + 100 if iterations is None else iterations)
    if not 1 <= k <= iterations:
        raise ValueError(f"`k` must be 1 to {iterations}, the smaller of n and `iterations`, got {k}; lower it.")
    generator = torch.Generator().manual_seed(seed)
    Q = torch.empty(iterations, n, dtype=dtype, device=device)
    T = torch.zeros(iterations, iterations, dtype=torch.float64)
    Q[0] = _orthogonal_start(Q[:0], generator)
    for m in range(1, iterations + 1):
        w, T[m - 1, m - 1] = _product(matvec, Q[:m])
        beta = w.norm().item()
        eigenvalues, S = torch.linalg.eigh(T[:m, :m])
        largest = eigenvalues.abs().max().item()
        broken = beta <= 10 * torch.finfo(dtype).eps * max(largest, torch.finfo(dtype).tiny)
        residual = beta * S[-1, -k:].abs().max().item()
        if m == iterations or (m >= k and not broken and residual <= tol * largest and tol > 0):
            break
        # After a breakdown, a new vector reaches further eigenvectors of the same eigenvalue; one start cannot.
        Q[m] = _orthogonal_start(Q[:m], generator) if broken else w / beta
        T[m, m - 1] = T[m - 1, m] = 0.0 if broken else beta
    if m < n and residual > tol * largest and tol > 0:
        warnings.warn(
            f"After {m} products the residual is {residual / largest:.1e} of the largest eigenvalue, above "
            f"tol = {tol}; raise `iterations`.",
            stacklevel=2,
        )
    vectors = Q[:m].T @ S[:, -k:].flip(1).to(Q)
    return eigenvalues[-k:].flip(0).to(Q), vectors


def _product(matvec: Matvec, Q: Tensor) -> tuple[Tensor, Tensor]:
    """A q_m without its part in the span of the rows of Q, and q_m^T A q_m, q_m the last row."""
    w = matvec(Q[-1]).to(Q)
    if not w.isfinite().all():
        raise FloatingPointError(f"Products with the matrix must be finite, number {len(Q)} is not.")
    diagonal = torch.dot(w, Q[-1])
    for _ in range(2):  # the second time removes what rounding left
        w -= Q.T @ (Q @ w)
    return w, diagonal


def _orthogonal_start(Q: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the rows of Q: [n]."""
    q = torch.randn(Q.shape[1], generator=generator, dtype=torch.float64).to(Q)
    for _ in range(2):
        q -= Q.T @ (Q @ q)
        q /= q.norm()
    return q


def coverage(c: Tensor, V: Tensor) -> float:
    """The share of span(V) that lies in span(c): |Q^T V|_F^2 / k, with Q and V orthonormal bases of the two.

    It is 1 if span(c) contains span(V), and C / n on average for random c.

    Args:
        c: [C, n]; any rows, such as class gradients.
        V: [n, k]; any columns, such as eigenvectors of the Hessian.

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
    """An orthonormal basis of the span of the rows, whatever their lengths: float64 [rank, n]."""
    rows = rows.detach().double()
    norms = rows.norm(dim=1, keepdim=True)
    _, values, basis = torch.linalg.svd(rows / torch.where(norms > 0, norms, 1.0), full_matrices=False)
    return basis[values > 1e-6]
