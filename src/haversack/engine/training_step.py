"""A plain training step: forward, loss, backward, update, over batches that are given. Measured and traced alike.

Everything that decides bytes is the workload's: precision, optimizer, recomputation, attention, adapters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from haversack.describe.model import Model
from haversack.describe.parallel import check_spread
from haversack.describe.workload import PACKED, TrainingWorkload, TuneWorkload, recomputation
from haversack.engine.adapters import LowRankAdapter, PackedLinear, ReadMatrix, adapt
from haversack.engine.connections import PartialConnections, connections_of
from haversack.engine.cut_loss import CutLoss
from haversack.engine.fewer_tokens import FewerTokens
from haversack.engine.optimizers import NOT_INNER, MasterWeights, Stepper, make_optimizer
from haversack.engine.packed_tensor import packed_parameters, packed_tensors
from haversack.engine.pairs import Pairs
from haversack.engine.recompute import RecomputeLayers
from haversack.engine.resting_layers import RestingLayers
from haversack.engine.reversible import ReversibleLayers
from haversack.engine.rotated_products import RotatedProducts
from haversack.engine.rounded_weights import RoundedTensor, RoundedWeights, round_weights, rounded_of
from haversack.engine.sampled_rows import SampleRows
from haversack.engine.saved_activations import ActivationFile, SaveAsFloat8, SaveInEightBits, SaveOnDisk
from haversack.engine.scales import TrainedScales, scales_of
from haversack.engine.side_network import SideNetwork, side_parameters
from haversack.engine.update_in_backward import UpdateInBackward
from haversack.errors import UsageError
from haversack.parts.loss.base import IGNORED
from haversack.recipes.base import optimizer_option, preference

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from haversack.engine.shards import Shards

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


class TrainingStep:
    """A model made ready for a workload, and its optimizer once it is told to `begin`.

    `model` is a causal language model in the workload's `weights_dtype`; it is changed: adapters are put in, layers are told to
    recompute. `scratch` is the folder for activations that are kept on disk (the system's, if left out); `read` gives the matrices that a model
    opened to be packed has left on meta.
    """

    def __init__(
        self,
        model: Any,
        described: Model,
        workload: TrainingWorkload,
        scratch: Path | None = None,
        read: ReadMatrix | None = None,
    ):
        self.model = model
        self.workload = workload
        optimizer_option(workload.optimizer)  # a name that there is
        self.preference = preference(workload.objective) if isinstance(workload, TuneWorkload) else None
        self.preferred: torch.Tensor | None = None
        """Of the last batch of pairs, the share whose chosen answer the objective sees preferred."""
        dtype = torch.float32 if workload.precision in ("master", "rotated8") else DTYPES[workload.weights_dtype]
        if isinstance(workload, TuneWorkload) and workload.method == "side":
            SideNetwork(model, dtype)
        elif isinstance(workload, TuneWorkload) and workload.method != "full":
            adapt(
                model,
                described,
                rank=workload.lora_rank,
                targets=workload.lora_targets,
                packed=workload.method in PACKED,
                dtype=dtype,
                dropout=workload.lora_dropout,
                kind={"paca": PartialConnections, "peqa": TrainedScales}.get(workload.method, LowRankAdapter),
                decomposed=workload.method == "lq-lora",
                read=read,
            )
        if workload.precision == "int8":
            round_weights(model, described, read)
        self.notes: list[str] = []
        """What a user should know of how this machine does it."""
        if workload.precision == "rotated8" and RotatedProducts(model).emulated:
            self.notes.append(
                "products in 8-bit integers are emulated: this hardware rounds as if it had them, and is no faster"
            )
        recomputed = recomputation(workload.recompute, described.num_layers)
        if recomputed:
            RecomputeLayers(model, recomputed)
        if workload.saved in ("8bit", "resting"):
            SaveInEightBits(model)
        if workload.saved == "sampled":
            SampleRows(model)
        if workload.saved == "fp8":
            SaveAsFloat8(model)
        if workload.saved == "tokens":
            FewerTokens(model)
        if workload.saved == "reversible":
            ReversibleLayers(model)
        self.resting = RestingLayers(model) if workload.saved == "resting" else None
        """The layers of which some rest in each step, if they do; from `begin` on."""
        self.on_disk: ActivationFile | None = None
        """Where activations are kept on disk, if they are."""
        if workload.saved == "disk":
            self.on_disk = SaveOnDisk(model, scratch or Path(tempfile.gettempdir())).file
        model.train()
        self.cut = CutLoss(model.config) if workload.loss == "cut" else None
        self.optimizer = Stepper([])
        self.in_backward: UpdateInBackward | None = None
        self.shards: Shards | None = None

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep this rank's rows of every weight alone; before `begin`. Losses are then shares of all ranks' together. Raises UsageError
        for an optimizer that needs whole matrices, and for what one process alone can do."""
        from haversack.engine.shards import Shards, check_sharded_optimizer

        check_sharded_optimizer(self.workload.optimizer)
        check_spread(self.workload)
        self.shards = Shards(self.model, mesh)

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        """What this process holds of one of the model's parameters: all of it, or a rank's rows."""
        return parameter if self.shards is None else self.shards.own(parameter)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights that are trained, those at rest too, as the model has them now."""
        at_rest = set() if self.resting is None else {id(parameter) for parameter in self.resting.parameters()}
        return [p for p in self.model.parameters() if p.requires_grad or id(p) in at_rest]

    def begin(self, described: Model) -> TrainingStep:
        """This, with an optimizer made anew over the weights that the model has now."""
        self.optimizer = self._make_optimizer(described)
        if self.workload.update == "backward":
            self.in_backward = UpdateInBackward(self.trained, self.optimizer)
        if self.resting is not None:
            self.resting.rest()
        return self

    def micro_step(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        pairs: Pairs | None = None,
        *,
        share: float = 1.0,
    ) -> torch.Tensor:
        """Loss and gradients of one batch, as `loss` takes it, times `share`: the batch's part of what the step's loss is a mean
        over. The loss, detached."""
        loss = self.loss(ids, labels, positions, pairs)
        if share != 1.0:
            loss = loss * share
        loss.backward()
        return loss.detach()

    def loss(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> torch.Tensor:
        """The mean negative log-likelihood of the next token, in nats, of token ids `(batch_size, seq_len)` without padding; of
        pairs of answers, the mean of the objective's loss, and `preferred` is set.

        `labels` have -100 where a token is not counted (all are if left out); `positions` begin at 0 with each sample of a row, and
        samples do not see one another.
        """
        labels = ids if labels is None else labels
        if self.shards is not None:
            return self.shards.run(self._loss, ids, labels, positions, pairs)
        return self._loss(ids, labels, positions, pairs)

    def _loss(
        self, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None, pairs: Pairs | None
    ) -> torch.Tensor:
        if self.preference is not None:
            return self._preference_loss(ids, labels, positions, pairs)
        with self._autocast(ids.device.type):
            inputs = _inputs(ids, positions)
            if self.cut is not None:
                return self.cut(self.model, labels, **inputs)
            if self.workload.loss == "fp32":
                return self.model(**inputs, labels=labels, use_cache=False).loss
            logits = self.model(**inputs, use_cache=False).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def log_likelihoods(
        self, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None, pairs: Pairs
    ) -> torch.Tensor:
        """Of each pair's answers, in nats over their counted tokens, float32 `(num_pairs, 2)`: chosen, rejected."""
        if self.shards is not None:
            return self.shards.run(self._log_likelihoods, ids, labels, positions, pairs)
        return self._log_likelihoods(ids, labels, positions, pairs)

    def _log_likelihoods(
        self, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None, pairs: Pairs
    ) -> torch.Tensor:
        return -pairs.sums(self._token_losses(ids, labels, positions))

    def _preference_loss(
        self, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None, pairs: Pairs | None
    ) -> torch.Tensor:
        assert self.preference is not None and pairs is not None, "a loss over pairs needs them"
        num_tokens = pairs.sums(labels[:, 1:].reshape(-1) != IGNORED)
        reference = None if pairs.reference is None else pairs.reference.view(-1, 2)
        found = self._log_likelihoods(ids, labels, positions, pairs)
        losses, margins = self.preference.pair_losses(found, num_tokens, reference)
        self.preferred = (margins.detach() > 0).float().mean()
        return losses.mean()

    def _token_losses(self, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Each next token's negative log-likelihood, float32 `(batch_size * (seq_len - 1),)`; 0 where its label is -100."""
        with self._autocast(ids.device.type):
            inputs = _inputs(ids, positions)
            if self.cut is not None:
                return self.cut.token_losses(self.model, labels, **inputs)
            logits = self.model(**inputs, use_cache=False).logits
            logits = logits.float() if self.workload.loss == "fp32" else logits
            following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # logits as they are: cutting them would copy them
            losses = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none", ignore_index=IGNORED)
            return losses.view(ids.shape)[:, :-1].reshape(-1)

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
        if self.shards is not None:
            self.shards.take_gradients(self.trained)
        grads = [own.grad for own in map(self.own, self.trained) if own.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads])
        if self.shards is not None:
            norms = self.shards.sum(norms.square().sum()).sqrt()
        norm = float(torch.linalg.vector_norm(norms))
        if max_norm and norm > max_norm:
            for grad in grads:
                grad.mul_(max_norm / norm)
        return norm

    def update(self) -> None:
        """One step of the optimizer; gradients are dropped (there are none if weights were updated during the backward pass)."""
        if self.shards is not None:
            self.shards.take_gradients(self.trained)
        with nullcontext() if self.resting is None else self.resting.watched():
            self.optimizer.step()

    def run(self, batches: Sequence[Mapping[str, Any]]) -> float:
        """One step over its micro-batches, each as `loss` takes it; the last one's loss."""
        loss = torch.zeros(())
        for batch in batches:
            loss = self.micro_step(**batch)
        self.update()
        return float(loss)

    def residents(self) -> dict[str, list[torch.Tensor]]:
        """What stays from step to step, by owner."""
        adapters: list[torch.Tensor] = []
        adapters += [
            p
            for m in self.model.modules()
            if isinstance(m, LowRankAdapter)
            for p in (m.down, m.up, *m.buffers(recurse=False))
        ]
        adapters += [module.scales for module in scales_of(self.model).values()]
        adapters += [t for m in connections_of(self.model).values() for t in (m.weight, m.columns)]
        adapters += side_parameters(self.model).values()
        own = {id(tensor) for tensor in adapters}
        packed = [t for m in self.model.modules() if isinstance(m, PackedLinear) for t in (m.codes, m.scales)]
        packed += [module.codes for module in scales_of(self.model).values()]
        packed += [t for m in rounded_of(self.model).values() for t in m.rounded.stored.values()]
        packed += packed_tensors(self.model)
        hold_nothing = [*packed_parameters(self.model), *(m.weight for m in rounded_of(self.model).values())]
        own |= {id(tensor) for tensor in (*packed, *hold_nothing)}
        masters: list[torch.Tensor] = []
        if isinstance(self.optimizer, MasterWeights):
            masters += self.optimizer.masters
        rows = {
            "weights": [p for p in self.model.parameters() if id(p) not in own]
            + [b for b in self.model.buffers() if id(b) not in own],
            "packed weights": packed,
            "adapters": adapters,
            "master weights": masters,
            "optimizer states": self.optimizer.state_tensors(),
        }
        if self.shards is not None:
            held: dict[int, torch.Tensor] = {id(p): self.own(p) for p in self.model.parameters()}
            rows = {owner: [held.get(id(tensor), tensor) for tensor in tensors] for owner, tensors in rows.items()}
        return {owner: tensors for owner, tensors in rows.items() if tensors}

    def _autocast(self, device: str) -> AbstractContextManager[Any]:
        if self.workload.precision != "autocast":
            return nullcontext()
        return torch.autocast(device, dtype=torch.bfloat16)

    def _make_optimizer(self, described: Model) -> Stepper:
        matrices = [self.own(parameter) for parameter in inner_matrices(self.model, described)]
        return self.optimizer_over([self.own(parameter) for parameter in self.trained], matrices)

    def optimizer_over(self, trained: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter]) -> Stepper:
        """The workload's optimizer over some weights, of which `matrices` are those inside the layers."""
        name = self.workload.optimizer
        if not self.workload.updates_in_32_bits:
            return make_optimizer(name, trained, matrices)
        taken = {id(parameter) for parameter in matrices}

        def make(wide: Sequence[nn.Parameter]) -> Stepper:
            inner = [own_wide for own_wide, own in zip(wide, trained, strict=True) if id(own) in taken]
            return make_optimizer(name, wide, inner)

        if self.workload.precision != "int8":
            return MasterWeights(trained, make)
        rounded = {id(module.weight): module.rounded for module in rounded_of(self.model).values()}
        known = {id(parameter) for parameter in self.model.parameters()}
        for matrix in matrices:
            if id(matrix) not in known:  # a trace's, in the place of one of the model's
                rounded[id(matrix)] = RoundedTensor(tuple(matrix.shape), matrix.device)
        return RoundedWeights(trained, make, rounded)


def _inputs(ids: torch.Tensor, positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
    own = {"attention_mask": torch.ones_like(ids)} if positions is None else {"position_ids": positions}
    return {"input_ids": ids, **own}


def inner_matrices(model: nn.Module, described: Model) -> list[nn.Parameter]:
    """The trained matrices inside the layers: all but embeddings, the head, vectors and stacks."""
    outside = {(site.module, site.parameter) for site in described.weights if site.role in NOT_INNER}
    outside |= {
        (name, site.parameter) for site in described.weights if site.role in NOT_INNER for name in site.tied_modules
    }
    excluded = {id(getattr(model.get_submodule(module), parameter)) for module, parameter in outside}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in excluded]
