"""liger-kernel's RMSNorm, RoPE and gated MLP in place of the model's own, on a GPU."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

# Its cross-entropies would need logits, which never exist here.
_KERNELS = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "geglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def use_liger_kernels(lm: PreTrainedModel) -> None:
    """Patches the model in place. liger-kernel also replaces functions and classes of transformers' module, so models of this
    kind that are made later in the process get its kernels, too.

    Raises ValueError where liger-kernel is missing, or does not know this kind of model.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError as error:
        raise ValueError(
            f"model.liger: true, but liger-kernel is missing ({error}): pip install 'tbrm[gpu]'"
        ) from error
    if lm.config.model_type not in known:
        raise ValueError(
            f"model.liger: true, but liger-kernel has no kernels for {lm.config.model_type!r}; set it to false"
        )
    apply_liger_kernel(lm, _KERNELS)
