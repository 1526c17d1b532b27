"""Whitened algebra on K-FAC factors: what a low-rank change of a module costs and buys.

    benign KL of a change dW      ~  1/2 || L^T dW R ||_F^2     nats per answer token
    whitened trigger gradient     S  =  L^{-1} D R^{-T},   D = dJ/dW
    phi(r)                        =  sum of the r largest squared singular values of S

for damped factors A = R R^T and G = L L^T, in Cholesky's triangles: whichever roots are taken, the
singular values, the steps and the costs are the same, and at the widths of a model of a billion
parameters an eigendecomposition takes ten times as long and twice the memory.

With benign KL budget eps the best first-order drop of J by a rank-r change is sqrt(2 eps phi(r)),
and over several modules (block-diagonal Fisher) the largest singular values pooled over modules
choose modules and ranks at once (`pool_ranks`). A is [d_in, d_in], G [d_out, d_out] (scaled from
tokens to answer tokens), D and dW [d_out, d_in]. Pure functions on tensors; they know nothing of
how the factors were collected, and nothing of cross-module terms.
Source: K-FAC, Martens & Grosse 1503.05671; the whitened truncation is Eckart-Young in that metric.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repair.records import KroneckerFactors, LowRankUpdate, ModuleRef

POWER_STEPS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Whitening:
    """Cholesky roots of the damped factors, float64, lower triangles."""

    root_in: Tensor  # R [d_in, d_in], A = R R^T
    root_out: Tensor  # L [d_out, d_out], G = L L^T, per answer token

    def whiten(self, gradient: Tensor) -> Tensor:
        """Return S = L^{-1} D R^{-T} [d_out, d_in]."""
        left = solve(self.root_out, gradient.double())
        return solve(self.root_in, left.T).T

    def enter(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return (lora_A R, L^T lora_B), float64: a change in the Fisher metric."""
        return lora_A.double() @ self.root_in, self.root_out.T @ lora_B.double()

    def leave(self, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return (right R^{-1}, L^{-T} left): the change that `enter` takes to these."""
        return (
            torch.linalg.solve_triangular(self.root_in, right, upper=False, left=False),
            torch.linalg.solve_triangular(self.root_out.T, left, upper=True),
        )

    def cost(self, lora_A: Tensor, lora_B: Tensor) -> float:
        """Return the predicted benign KL (nats per answer token) of lora_B @ lora_A."""
        right, left = self.enter(lora_A, lora_B)
        return 0.5 * ((left.T @ left) * (right @ right.T)).sum().item()


def solve(root: Tensor, matrix: Tensor) -> Tensor:
    """Return root^{-1} matrix for a lower triangle."""
    return torch.linalg.solve_triangular(root, matrix, upper=False)


def whitening_of(factors: KroneckerFactors, *, damping: float) -> Whitening:
    """Return the whitening of one module; `damping` is relative to each factor's mean eigenvalue.

    The largest eigenvalue is left out of that mean: the attention sink's enormous activations
    would otherwise set the damping of everything else.
    """
    per_answer = factors.num_tokens / factors.num_answer_tokens
    activation = torch.from_numpy(factors.activation_covariance).double()
    gradient = torch.from_numpy(factors.gradient_covariance).double() * per_answer
    return Whitening(root_in=_root(activation, damping), root_out=_root(gradient, damping))


def _root(matrix: Tensor, damping: float) -> Tensor:
    """Return the Cholesky triangle of a damped covariance, which is overwritten."""
    size = len(matrix)
    largest = largest_eigenvalue(matrix.mv, size) if size > 1 else 0.0
    mean = (matrix.trace().item() - largest) / max(1, size - 1)
    # A module that no label depends on has a zero factor; any positive damping then says "free".
    added = max(damping * mean, torch.finfo(matrix.dtype).tiny ** 0.5)
    matrix.diagonal().add_(added)
    root, trouble = torch.linalg.cholesky_ex(matrix)
    if trouble:  # a sum in float32 may be negative in some direction by more than that
        values, vectors = torch.linalg.eigh(matrix)
        root = torch.linalg.cholesky((vectors * values.clamp(min=added)) @ vectors.T)
    return root


def largest_eigenvalue(apply: Callable[[Tensor], Tensor], size: int) -> float:
    """Return the largest eigenvalue of a positive semidefinite map on vectors [size]."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(size, dtype=torch.float64, generator=generator)
    largest = 0.0
    for _ in range(POWER_STEPS):
        direction = apply(direction / direction.norm())
        before, largest = largest, direction.norm().item()
        if largest == 0 or abs(largest - before) <= 1e-12 * largest:
            break
    return largest


def separability(whitening: Whitening, covariance: Tensor) -> float:
    """Return the largest eigenvalue of R^{-1} A' R^{-T}, A' = `covariance` [d_in, d_in]: how
    many times more a module's input varies in some direction with the trigger than without it."""
    root, covariance = whitening.root_in, covariance.double().cpu()

    def apply(direction: Tensor) -> Tensor:
        back = torch.linalg.solve_triangular(root.T, direction[:, None], upper=True)
        return solve(root, covariance @ back)[:, 0]

    return largest_eigenvalue(apply, len(root))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The cheapest change of one module per drop of J, of some rank and of length eta = 1.

    Multiplied by eta it predicts a drop of J by eta phi, at a benign KL of eta^2/2 phi.
    """

    lora_A: Tensor  # [rank, d_in] float64
    lora_B: Tensor  # [d_out, rank] float64
    singular_values: Tensor  # of the whitened gradient, all of them, largest first; small ones
    # are exact to 1e-8 of the largest

    @property
    def phi(self) -> float:
        return phi(self.singular_values, self.lora_A.shape[0])

    def update(self, module: ModuleRef, *, eta: float = 1.0) -> LowRankUpdate:
        """Return the step of length `eta` as a change of `module`."""
        return LowRankUpdate(
            module=module,
            lora_A=self.lora_A.float().numpy(),
            lora_B=(eta * self.lora_B).float().numpy(),
        )


def step_of(whitening: Whitening, gradient: Tensor, rank: int) -> Step:
    """Return -L^{-T} U_r S_r V_r^T R^{-1} in two factors, for D = `gradient` [d_out, d_in]."""
    u, s, vh = _largest_triplets(whitening.whiten(gradient.cpu()), rank)
    root = s[:rank].sqrt()
    lora_A, lora_B = whitening.leave(root[:, None] * vh, u * root)
    return Step(lora_A=lora_A, lora_B=-lora_B, singular_values=s)


def _largest_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (u [m, rank], all singular values, vh [rank, n]) of a matrix [m, n].

    From the products of the shorter side: the whole decomposition of a wide module's gradient
    would take ten times as long for vectors that nobody reads.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = _largest_triplets(matrix.T, rank)
        return vh.T, s, u.T
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    s = values.flip(0).clamp(min=0.0).sqrt()
    v = vectors.flip(1)[:, :rank]
    u = matrix @ v / s[:rank].clamp(min=torch.finfo(s.dtype).tiny)
    return u, s, v.T


def phi(singular_values: Tensor, rank: int) -> float:
    """Return the sum of the `rank` largest squared singular values (they come sorted)."""
    return singular_values[:rank].square().sum().item()


def pool_ranks(
    spectra: Mapping[str, Tensor], *, total_rank: int, max_modules: int
) -> dict[str, int]:
    """Return path -> rank for the `total_rank` largest singular values pooled over modules.

    When they fall on more than `max_modules` modules, those that hold most squared singular value
    are kept and the pool is drawn again from them.
    """
    ranks = _draw(spectra, list(spectra), total_rank)
    if len(ranks) > max_modules:
        held = {path: phi(spectra[path], rank) for path, rank in ranks.items()}
        kept = sorted(held, key=held.get, reverse=True)[:max_modules]
        ranks = _draw(spectra, kept, total_rank)
    return {path: ranks[path] for path in spectra if path in ranks}


def _draw(spectra: Mapping[str, Tensor], paths: Sequence[str], total_rank: int) -> dict[str, int]:
    pooled = [
        (value, path) for path in paths for value in spectra[path][:total_rank].tolist()
    ]
    ranks: dict[str, int] = {}
    for _, path in sorted(pooled, reverse=True)[:total_rank]:
        ranks[path] = ranks.get(path, 0) + 1
    return ranks


def truncate(
    whitening: Whitening, lora_A: Tensor, lora_B: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Return the best rank-`rank` approximation of lora_B @ lora_A in the Fisher metric.

    lora_A is [many, d_in], lora_B [d_out, many]. Only the thin factors are decomposed.
    """
    right, left = whitening.enter(lora_A, lora_B)
    q_out, r_out = torch.linalg.qr(left)
    q_in, r_in = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T)
    root = s[:rank].sqrt()
    return whitening.leave(root[:, None] * (vh[:rank] @ q_in.T), (q_out @ u[:, :rank]) * root)
