"""What goes over the wire: tensors by name, and a few facts, as Flower's records. Nothing that arrives is ever executed."""

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict


def packed(tensors: dict[str, torch.Tensor], facts: dict) -> RecordDict:
    """facts: {name: bool, int, float, str}."""
    arrays = {name: Array(v.detach().cpu().contiguous().numpy()) for name, v in tensors.items()}
    return RecordDict({'tensors': ArrayRecord(arrays), 'facts': ConfigRecord(facts)})


def unpacked(content: RecordDict) -> tuple[dict, dict]:
    """(tensors, facts); None for a tensor that is none: `federate.refusal` says so. What is not there is empty."""
    tensors = {}
    for name, array in content.array_records.get('tensors', {}).items():
        try:  # not only numpy's own errors: the bytes are anybody's
            tensors[name] = torch.from_numpy(array.numpy())
        except Exception:
            tensors[name] = None
    return tensors, dict(content.config_records.get('facts', {}))
