"""Reference log-probabilities of a whole prepared set: computed once, kept by the content of data, model and settings.

Letters: P pairs of answers, n records.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ta.data.loader import micro_batches
from ta.files import hash_json
from ta.parallel import gather_objects, rank, say

if TYPE_CHECKING:
    from torch import Tensor

    from ta.data.answer_batches import Logps
    from ta.data.loader import Dress
    from ta.data.prepare import Prepared

PART = 2048  # records between two files of a table that is being computed


def cached(
    logps: Logps,
    prepared: Prepared,
    dress: Dress,
    key: Any,
    folder: Path,
    *,
    max_tokens_per_micro: int,
    packed: bool,
    device: str,
) -> Tensor:
    """(n, 2) log-probabilities of both answers of each record, on the CPU: from folder/KEY.safetensors, or computed once and kept there.

    `key` (JSON values) names model, settings and what `dress` depends on; the set's content is added. Every PART records a part is written, so
    that a stopped run goes on; the whole is published by one rename. All processes take part.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from ta.data.batch import to_device

    n = len(prepared.origin)
    name = hash_json(
        [key, prepared.info["fingerprint"], Path(prepared.info.get("folder", "")).name, n]
    )[:32]
    whole = folder / f"{name}.safetensors"
    if (known := gather_objects(_read(whole, n) if rank() == 0 else None)[0]) is not None:
        say(f"reference log-probabilities of {n:,} records: from {whole}")
        return known
    places = {start: folder / f"{name}-{start}.safetensors" for start in range(0, n, PART)}
    parts = []
    for start, path in tqdm(
        places.items(),
        desc="reference",
        unit_scale=PART,
        unit="record",
        delay=2,
        disable=rank() > 0,
        leave=False,
    ):
        records = np.arange(start, min(n, start + PART))
        known = gather_objects(_read(path, len(records)) if rank() == 0 else None)[0]
        if known is None:
            found, dtype = {}, torch.float32
            for batch, chosen in micro_batches(
                prepared,
                records,
                max_tokens_per_micro,
                packed,
                lambda batch, chosen: (dress(batch, chosen), chosen),
            ):
                values = to_device(batch, device).both(logps)  # (P, 2)
                found, dtype = (
                    found | dict(zip(chosen.tolist(), values.tolist(), strict=True)),
                    values.dtype,
                )
            merged = {
                record: values
                for share in gather_objects(found)
                for record, values in share.items()
            }
            known = torch.tensor([merged[record] for record in records.tolist()], dtype=dtype)
            _write(path, known)
        parts.append(known)
    table = torch.cat(parts)
    _write(whole, table)
    if rank() == 0:
        for path in places.values():
            path.unlink(missing_ok=True)
    return table


def _read(path: Path, n: int) -> Tensor | None:
    """The table in a file; None where there is none or (which is said) it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        return None
    try:
        table = load_file(path).get("logps")
    except (SafetensorError, OSError, ValueError) as error:
        say(f"{path} is damaged ({error}): computing it again")
        return None
    if table is None or tuple(table.shape) != (n, 2) or not table.isfinite().all():
        say(f"{path} does not hold {n} x 2 finite numbers: computing it again")
        return None
    return table


def _write(path: Path, table: Tensor) -> None:
    """Write beside, sync, rename (rank 0 only)."""
    from safetensors.torch import save

    if rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(save({"logps": table.contiguous()}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
