"""What goes over the wire: tensors by name, as the bytes of a safetensors file, and a few facts. Nothing of it can be run.

One array for all tensors: Flower asks for every array on its own, which takes longer than a round of training."""

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import load, save

from run.journal import FREE

LOCAL = (*FREE, 'public_text')  # switches about where things are, which are every machine's own affair


def packed(tensors: dict[str, torch.Tensor], facts: dict) -> RecordDict:
    """facts: {name: bool, int, float, str}."""
    raw = save({name: v.detach().cpu().contiguous() for name, v in tensors.items()})
    return RecordDict({'tensors': ArrayRecord([np.frombuffer(raw, np.uint8)]), 'facts': ConfigRecord(facts)})


def unpacked(content: RecordDict) -> tuple[dict, dict]:
    """(tensors, facts). Of bytes that hold no tensors one that nobody expects: `federate.refusal` says so."""
    facts = dict(content.config_records.get('facts', {}))
    try:  # anybody's bytes: whatever they raise
        (array,) = content.array_records['tensors'].values()
        return load(array.numpy().tobytes()), facts
    except Exception:
        return {'no tensors': torch.empty(0)}, facts
