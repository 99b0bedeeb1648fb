"""A plain training step: forward, loss, backward, update, over batches that are given. Measured and traced alike.

Everything that decides bytes is the workload's: precision, optimizer, recomputation, attention, adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from haversack.describe.model import Model
from haversack.describe.workload import TrainingWorkload, TuneWorkload, recomputed_layers
from haversack.engine.adapters import LowRankAdapter, PackedLinear, adapt
from haversack.engine.cut_loss import CutLoss
from haversack.engine.optimizers import NOT_INNER, MasterWeights, Stepper, make_optimizer
from haversack.engine.packed_tensor import packed_parameters, packed_tensors
from haversack.engine.recompute import RecomputeLayers
from haversack.engine.update_in_backward import UpdateInBackward
from haversack.errors import UsageError
from haversack.recipes.base import optimizer_option

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


class TrainingStep:
    """A model made ready for a workload, and its optimizer once it is told to `begin`.

    `model` is a causal language model in the workload's `weights_dtype`; it is changed: adapters are put in, layers are told to
    recompute.
    """

    def __init__(self, model: Any, described: Model, workload: TrainingWorkload):
        self.model = model
        self.workload = workload
        optimizer_option(workload.optimizer)  # a name that there is
        dtype = torch.float32 if workload.precision == "master" else DTYPES[workload.weights_dtype]
        if isinstance(workload, TuneWorkload) and workload.method != "full":
            adapt(
                model,
                described,
                rank=workload.lora_rank,
                targets=workload.lora_targets,
                packed=workload.method == "qlora",
                dtype=dtype,
                dropout=workload.lora_dropout,
            )
        recomputed = recomputed_layers(workload.recompute, described.num_layers)
        if recomputed:
            RecomputeLayers(model, recomputed)
        model.train()
        self.cut = CutLoss(model.config) if workload.loss == "cut" else None
        self.optimizer = Stepper([])
        self.in_backward: UpdateInBackward | None = None

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights that are trained, as the model has them now."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def begin(self, described: Model) -> TrainingStep:
        """This, with an optimizer made anew over the weights that the model has now."""
        self.optimizer = self._make_optimizer(described)
        if self.workload.update == "backward":
            self.in_backward = UpdateInBackward(self.trained, self.optimizer)
        return self

    def micro_step(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        share: float = 1.0,
    ) -> torch.Tensor:
        """Loss and gradients of one batch, as `loss` takes it, times `share`: the batch's part of the step's trained tokens. The
        loss, detached."""
        loss = self.loss(ids, labels, positions)
        if share != 1.0:
            loss = loss * share
        loss.backward()
        return loss.detach()

    def loss(
        self, ids: torch.Tensor, labels: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mean negative log-likelihood of the next token, in nats, of token ids `(batch_size, seq_len)` without padding.

        `labels` have -100 where a token is not counted (all are if left out); `positions` begin at 0 with each sample of a row, and
        samples do not see one another.
        """
        labels = ids if labels is None else labels
        with self._autocast(ids.device.type):
            mask = {"attention_mask": torch.ones_like(ids)} if positions is None else {"position_ids": positions}
            if self.cut is not None:
                return self.cut(self.model, labels, input_ids=ids, **mask)
            if self.workload.loss == "fp32":
                return self.model(input_ids=ids, **mask, labels=labels, use_cache=False).loss
            logits = self.model(input_ids=ids, **mask, use_cache=False).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def clip(self, max_norm: float) -> float:
        """Scale all gradients so that their norm together is at most `max_norm` (0: as they are); the norm before. Sums are in 32
        bits. Pascanu et al. 2012, arXiv 1211.5063, algorithm 1. Raises UsageError where gradients are never there together."""
        if self.workload.update == "backward":
            if max_norm:
                raise UsageError(
                    f"gradients can't be clipped to a norm of {max_norm} together with update backward, which drops each as it comes; "
                    "choose update step, or leave gradients as they are (0)."
                )
            return 0.0
        grads = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads])
        norm = float(torch.linalg.vector_norm(norms))
        if max_norm and norm > max_norm:
            for grad in grads:
                grad.mul_(max_norm / norm)
        return norm

    def update(self) -> None:
        """One step of the optimizer; gradients are dropped (there are none if weights were updated during the backward pass)."""
        self.optimizer.step()

    def run(self, batches: list[torch.Tensor]) -> float:
        """One step over its micro-batches; the last one's loss."""
        loss = torch.zeros(())
        for ids in batches:
            loss = self.micro_step(ids)
        self.update()
        return float(loss)

    def residents(self) -> dict[str, list[torch.Tensor]]:
        """What stays from step to step, by owner."""
        adapters = [p for m in self.model.modules() if isinstance(m, LowRankAdapter) for p in (m.down, m.up)]
        own = {id(tensor) for tensor in adapters}
        packed = [t for m in self.model.modules() if isinstance(m, PackedLinear) for t in (m.codes, m.scales)]
        packed += packed_tensors(self.model)
        own |= {id(tensor) for tensor in (*packed, *packed_parameters(self.model))}
        rows = {
            "weights": [p for p in self.model.parameters() if id(p) not in own]
            + [b for b in self.model.buffers() if id(b) not in own],
            "packed weights": packed,
            "adapters": adapters,
            "master weights": self.optimizer.masters if isinstance(self.optimizer, MasterWeights) else [],
            "optimizer states": self.optimizer.state_tensors(),
        }
        return {owner: tensors for owner, tensors in rows.items() if tensors}

    def _autocast(self, device: str) -> AbstractContextManager[Any]:
        if self.workload.precision != "autocast":
            return nullcontext()
        return torch.autocast(device, dtype=torch.bfloat16)

    def _make_optimizer(self, described: Model) -> Stepper:
        return self.optimizer_over(self.trained, inner_matrices(self.model, described))

    def optimizer_over(self, trained: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter]) -> Stepper:
        """The workload's optimizer over some weights, of which `matrices` are those inside the layers."""
        name = self.workload.optimizer
        if not self.workload.has_master_weights:
            return make_optimizer(name, trained, matrices)
        taken = {id(parameter) for parameter in matrices}

        def make(masters: Sequence[nn.Parameter]) -> Stepper:
            inner = [master for master, own in zip(masters, trained, strict=True) if id(own) in taken]
            return make_optimizer(name, masters, inner)

        return MasterWeights(trained, make)


def inner_matrices(model: nn.Module, described: Model) -> list[nn.Parameter]:
    """The trained matrices inside the layers: all but embeddings, the head, vectors and stacks."""
    outside = {(site.module, site.parameter) for site in described.weights if site.role in NOT_INNER}
    outside |= {
        (name, site.parameter) for site in described.weights if site.role in NOT_INNER for name in site.tied_modules
    }
    excluded = {id(getattr(model.get_submodule(module), parameter)) for module, parameter in outside}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in excluded]
