"""Models that cannot compute in half precision, and what becomes of them in a run that does."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from bert_finetune.processes import is_main_process

# By `model_type`. transformers' code masks DeBERTa's scores with the lowest float32, which bfloat16 cannot hold, and
# writes X-MOD's adapted states into a tensor of another dtype.
_FLOAT32_ONLY = frozenset({"deberta", "xmod"})


def needs_float32(config: PreTrainedConfig) -> bool:
    """Whether transformers' code for this architecture fails under autocast."""
    return config.model_type in _FLOAT32_ONLY


def keep_in_float32(model: PreTrainedModel, device: torch.device) -> None:
    """Have the encoder of a model that needs it compute in float32, also in a run in bfloat16 or float16; say so."""
    encoder = model.base_model
    if needs_float32(model.config) and "forward" not in vars(encoder):
        encoder.forward = torch.autocast(device.type, enabled=False)(encoder.forward)
        if is_main_process():
            print(f"{type(model).__name__} computes in float32: transformers' code for it knows no lower precision")
