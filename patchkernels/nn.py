"""Modules of the operators: drop-in replacements for ``nn.Embedding`` and for ``nn.Linear`` + ``F.cross_entropy``."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from patchkernels.numerics import check_patch_size
from patchkernels.ops.linear_patch_cross_entropy import linear_patch_cross_entropy
from patchkernels.ops.patch_embedding import patch_embedding


class PatchEmbedding(nn.Embedding):
    r"""``out[..., p, :] = (1/K) sum_k weight[input_ids[..., p*K + k], :]``: an ``nn.Embedding`` that reads patches.

    It has the parameter and the ``state_dict`` of ``nn.Embedding``, and at ``patch_size=1`` the same values, bit for
    bit. ``patch_size`` may be changed at any time. Maps ids of shape ``(..., T)`` to ``(..., T / K, D)``. The errors
    are those of :func:`patch_embedding`.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        patch_size: K, at least 1.
        padding_idx: tokens with this id are left out of the mean and get no gradient.
        device, dtype: of the weight.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        patch_size: int = 1,
        *,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_patch_size(patch_size)
        super().__init__(num_embeddings, embedding_dim, padding_idx=padding_idx, device=device, dtype=dtype)
        self.patch_size = patch_size

    def forward(self, input_ids: Tensor, patch_size: int | None = None, return_weight: bool = False) -> Any:
        """``patch_size`` overrides the module's for this call.

        ``return_weight`` gives ``(out, weight)``. The second is for a tied :class:`PatchLMHead`, as its argument
        ``weight``: :func:`patch_embedding` says why.
        """
        size = self.patch_size if patch_size is None else patch_size
        return patch_embedding(input_ids, self.weight, size, padding_idx=self.padding_idx, return_weight=return_weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, patch_size={self.patch_size}"


class PatchLMHead(nn.Linear):
    r"""``head(x) = x W^T + b``; ``head(x, target) = patch_cross_entropy(x W^T + b, target)`` without keeping logits.

    It has the parameters and the ``state_dict`` of ``nn.Linear``, without a bias by default. Loss and logits both go
    through ``forward``, so that module hooks (FSDP's, say) see them. Options of the loss and errors are those of
    :func:`linear_patch_cross_entropy`. If torch's tensor parallelism shards the head, pass ``target`` by keyword: its
    hooks drop all positional arguments but the first.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, target: Tensor | None = None, *, weight: Tensor | None = None, **options: Any
    ) -> Any:
        """Returns logits ``(..., V)``, or the loss if there is a target ``(..., K)`` or ``(...)``.

        With a tied :class:`PatchEmbedding`, ``weight`` is what that one returned with ``return_weight``.
        """
        weight = self.weight if weight is None else weight
        if target is None:
            if options:
                raise ValueError(f"options of the loss need a target, got {sorted(options)} without one")
            return F.linear(input, weight, self.bias)
        return linear_patch_cross_entropy(input, weight, target, linear_bias=self.bias, **options)
