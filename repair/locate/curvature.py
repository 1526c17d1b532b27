"""Whitened algebra on K-FAC factors: what a low-rank change of a module costs and buys.

    benign KL of a change dW      ~  1/2 || G^{1/2} dW A^{1/2} ||_F^2     nats per answer token
    whitened trigger gradient     S  =  G^{-1/2} D A^{-1/2},   D = dJ/dW
    phi(r)                        =  sum of the r largest squared singular values of S

With benign KL budget eps the best first-order drop of J by a rank-r change is sqrt(2 eps phi(r)),
and over several modules (block-diagonal Fisher) the largest singular values pooled over modules
choose modules and ranks at once (`pool_ranks`). A is [d_in, d_in], G [d_out, d_out] (scaled from
tokens to answer tokens), D and dW [d_out, d_in]. Pure functions on tensors; they know nothing of
how the factors were collected, and nothing of cross-module terms.
Source: K-FAC, Martens & Grosse 1503.05671; the whitened truncation is Eckart-Young in that metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repair.records import KroneckerFactors, LowRankUpdate, ModuleRef

POWER_STEPS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Whitening:
    """Square roots of the damped factors and their inverses, float64, symmetric."""

    root_in: Tensor  # A^{1/2} [d_in, d_in]
    inverse_root_in: Tensor  # A^{-1/2}
    root_out: Tensor  # G^{1/2} [d_out, d_out], per answer token
    inverse_root_out: Tensor  # G^{-1/2}

    def whiten(self, gradient: Tensor) -> Tensor:
        """Return S = G^{-1/2} D A^{-1/2} [d_out, d_in]."""
        return self.inverse_root_out @ gradient.double() @ self.inverse_root_in

    def cost(self, lora_A: Tensor, lora_B: Tensor) -> float:
        """Return the predicted benign KL (nats per answer token) of lora_B @ lora_A."""
        left = self.root_out @ lora_B.double()
        right = lora_A.double() @ self.root_in
        return 0.5 * ((left.T @ left) * (right @ right.T)).sum().item()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectral:
    """Eigenvalues and eigenvectors of both factors: decomposed once, whitened at any damping."""

    inputs: tuple[Tensor, Tensor]  # of A: [d_in], [d_in, d_in]
    outputs: tuple[Tensor, Tensor]  # of G, per answer token: [d_out], [d_out, d_out]

    def whitening(self, damping: float) -> Whitening:
        """Return the whitening; `damping` is relative to each factor's mean eigenvalue.

        The largest eigenvalue is left out of that mean: the attention sink's enormous activations
        would otherwise set the damping of everything else.
        """
        root_in, inverse_root_in = _roots(*self.inputs, damping)
        root_out, inverse_root_out = _roots(*self.outputs, damping)
        return Whitening(
            root_in=root_in,
            inverse_root_in=inverse_root_in,
            root_out=root_out,
            inverse_root_out=inverse_root_out,
        )


def decompose(factors: KroneckerFactors) -> Spectral:
    """Return the eigendecompositions of one module's factors, float64."""
    per_answer = factors.num_tokens / factors.num_answer_tokens
    activation = torch.from_numpy(factors.activation_covariance).double()
    gradient = torch.from_numpy(factors.gradient_covariance).double() * per_answer
    return Spectral(
        inputs=tuple(torch.linalg.eigh(activation)), outputs=tuple(torch.linalg.eigh(gradient))
    )


def whitening_of(factors: KroneckerFactors, *, damping: float) -> Whitening:
    """Return the whitening of one module (`Spectral.whitening`)."""
    return decompose(factors).whitening(damping)


def _roots(values: Tensor, vectors: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    values = values.clamp(min=0.0)
    mean = values[:-1].mean() if values.numel() > 1 else values.mean()
    # A module that no label depends on has a zero factor; any positive damping then says "free".
    values = values + (damping * mean).clamp(min=torch.finfo(values.dtype).tiny ** 0.5)
    root = values.sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def separability(whitening: Whitening, covariance: Tensor) -> float:
    """Return the largest eigenvalue of A^{-1/2} A' A^{-1/2}, A' = `covariance` [d_in, d_in]: how
    many times more a module's input varies in some direction with the trigger than without it."""
    whitened = whitening.inverse_root_in @ covariance.double().cpu() @ whitening.inverse_root_in
    direction = torch.ones(whitened.shape[0], dtype=torch.float64)
    largest = 0.0
    for _ in range(POWER_STEPS):
        direction = whitened @ (direction / direction.norm())
        largest = direction.norm().item()
        if largest == 0:
            break
    return largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The cheapest change of one module per drop of J, of some rank and of length eta = 1.

    Multiplied by eta it predicts a drop of J by eta phi, at a benign KL of eta^2/2 phi.
    """

    lora_A: Tensor  # [rank, d_in] float64
    lora_B: Tensor  # [d_out, rank] float64
    singular_values: Tensor  # of the whitened gradient, all of them, largest first

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
    """Return -G^{-1/2} U_r S_r V_r^T A^{-1/2} in two factors, for D = `gradient` [d_out, d_in]."""
    u, s, vh = torch.linalg.svd(whitening.whiten(gradient.cpu()), full_matrices=False)
    root = s[:rank].sqrt()
    return Step(
        lora_A=(root[:, None] * vh[:rank]) @ whitening.inverse_root_in,
        lora_B=-whitening.inverse_root_out @ (u[:, :rank] * root),
        singular_values=s,
    )


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
    q_out, r_out = torch.linalg.qr(whitening.root_out @ lora_B.double())
    q_in, r_in = torch.linalg.qr((lora_A.double() @ whitening.root_in).T)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T)
    root = s[:rank].sqrt()
    new_B = whitening.inverse_root_out @ (q_out @ u[:, :rank]) * root
    new_A = root[:, None] * (vh[:rank] @ q_in.T) @ whitening.inverse_root_in
    return new_A, new_B
