"""Flows and layer weights over a run: `flows.npz` and `layer_weights.csv`."""

import csv
import io
from pathlib import Path

import numpy as np

from bert_emd.layer_mapping import BRANCHES, LayerMapping, Matching
from bert_finetune.files import replacing_file, write_atomically


class LayerHistory:
    """Mean flows between two records, and the layer weights at each.

    `flows.npz` holds `steps` (records,), and for each branch in use `attention_flow`, `hidden_flow` (records, M, N):
    the mean flow since the record before; and what the mapping itself wants recorded, as it is then: of cost attention
    `{branch}_{side}_weights` (records, M or N), the weights that the step after the record starts with. What has been
    added since the last record is part of the state, so a resumed run's history is that of an uninterrupted one.
    """

    def __init__(self):
        self._records: dict[str, list[np.ndarray]] = {"steps": []}
        self._pending: dict[str, np.ndarray] = {}
        self._count = 0

    def add(self, matching: Matching) -> None:
        """Take in one step's flows."""
        for branch in BRANCHES:
            flow = getattr(matching, f"{branch}_flow")
            if flow is not None:
                self._pending[branch] = self._pending.get(branch, 0) + flow
        self._count += 1

    def record(self, step: int, mapping: LayerMapping | None) -> None:
        """Close the interval that ends with `step`; nothing happens when no flow came in since the last record."""
        if not self._count:
            return
        values = {"steps": np.array(step)}
        values |= {f"{branch}_flow": total / self._count for branch, total in self._pending.items()}
        values |= {name: value for name, value in mapping.recorded().items() if name.partition("_")[0] in self._pending}
        for name, value in values.items():
            self._records.setdefault(name, []).append(value)
        self._pending, self._count = {}, 0

    def save(self, folder: str | Path) -> None:
        """Write `flows.npz` into `folder`, the interval under way included."""
        arrays = {name: np.array(values) for name, values in self._records.items()}
        pending = {f"pending_{branch}": total for branch, total in self._pending.items()}
        with replacing_file(Path(folder) / "flows.npz") as aside:
            np.savez(aside, **arrays, **pending, pending_count=self._count)

    @property
    def has_records(self) -> bool:
        """Whether layers were matched at all."""
        return bool(self._records["steps"])

    def write(self, folder: str | Path) -> None:
        """Write what a finished run leaves: `flows.npz` where layers were matched, and `layer_weights.csv` where they
        were weighed."""
        if self.has_records:
            self.save(folder)
        if any(name.endswith("_weights") for name in self._records):
            self.write_weights(folder)

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote."""
        with np.load(Path(folder) / "flows.npz", allow_pickle=False) as arrays:
            self._count = int(arrays["pending_count"])
            self._pending = {b: arrays[f"pending_{b}"] for b in BRANCHES if f"pending_{b}" in arrays}
            self._records = {name: list(arrays[name]) for name in arrays.files if not name.startswith("pending_")}

    def write_weights(self, folder: str | Path) -> None:
        """Write `layer_weights.csv`: a row per record, a column per branch, side and layer (1-based)."""
        names = [name for name in self._records if name.endswith("_weights")]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        header = ["step"]
        for name in names:
            prefix = name.removesuffix("_weights")
            header += [f"{prefix}_{k}" for k in range(1, len(self._records[name][0]) + 1)]
        writer.writerow(header)
        for row, step in enumerate(self._records["steps"]):
            writer.writerow([int(step), *(f"{value:.6f}" for name in names for value in self._records[name][row])])
        write_atomically(Path(folder) / "layer_weights.csv", text.getvalue())
