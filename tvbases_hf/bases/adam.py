"""The AE paper's own recipe: gradient descent on a softmax encoder and a linear decoder."""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE_FLOOR = 0.1
ANNEAL_EVERY = 500
TRAINING_SWEEPS = 10
FINAL_SWEEPS = 2000


def adam_encoder(
    gram: Tensor,
    num_bases: int,
    rows: Tensor | None,
    scale: Tensor,
    temperature: float,
    anneal: float | None,
    steps: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Encoder [T, M] and decoder [M, T] after ``steps`` Adam steps (AE paper, section 4 and appendix E).

    Logits start N(0, 1), the decoder at 0; learning rate 0.01, weight decay 1e-6, loss divided by T^2. With ``rows``
    the encoder is Sinkhorn-balanced to these row sums (beyond the paper).
    """
    num_tasks = len(gram)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tasks, num_bases, generator=generator, dtype=torch.float64).requires_grad_()
    decoder = torch.zeros(num_bases, num_tasks, dtype=torch.float64, requires_grad=True)
    identity = torch.eye(num_tasks, dtype=torch.float64)
    optimizer = torch.optim.Adam([logits, decoder], lr=0.01, weight_decay=1e-6)
    for step in range(steps):
        if anneal is not None and step and step % ANNEAL_EVERY == 0:
            temperature = max(TEMPERATURE_FLOOR, temperature * anneal)
        optimizer.zero_grad()
        residual = _encode(logits, temperature, rows, TRAINING_SWEEPS) @ decoder - identity
        loss = ((residual * (gram @ residual)).sum(dim=0) * scale).sum() / num_tasks**2
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return _encode(logits, temperature, rows, FINAL_SWEEPS), decoder.detach()


def _encode(logits: Tensor, temperature: float, rows: Tensor | None, sweeps: int) -> Tensor:
    if rows is None:
        return torch.softmax(logits / temperature, dim=0)
    return sinkhorn(logits / temperature, rows, sweeps)


def sinkhorn(logits: Tensor, rows: Tensor, sweeps: int) -> Tensor:
    """Positive matrix with columns that sum to 1 and rows that sum to ``rows``, by alternate log-normalisation.

    Columns are normalised last, so that they are exact; rows are within the convergence of the sweeps.
    """
    log_rows = rows.log()[:, None]
    for _ in range(sweeps):
        logits = logits - torch.logsumexp(logits, dim=1, keepdim=True) + log_rows
        logits = logits - torch.logsumexp(logits, dim=0, keepdim=True)
        if not logits.requires_grad and (logits.exp().sum(dim=1) - rows).abs().max() < 1e-15 * len(rows):
            break
    return logits.exp()
