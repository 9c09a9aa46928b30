"""Flows and layer weights over a run: `flows.npz` and `layer_weights.csv`."""

import csv
import io
from pathlib import Path

import numpy as np

from bert_emd.layer_mapping import BRANCHES, LayerMapping, Matching
from bert_finetune.files import replacing_file, write_atomically


class LayerHistory:
    """Flows and layer weights over a run, summed up between two records.

    `flows.npz` holds `steps` (records,), and for each branch in use `attention_flow`, `hidden_flow` (records, M, N):
    the mean flow since the record before; and of what the mapping itself wants recorded the interval's mean, minimum
    and maximum: of cost attention `{branch}_{side}_weights`, `..._weights_min`, `..._weights_max` (records, M or N). A
    step's weights are those that the next one starts with; one step's alone would mislead, as weights may swing. What
    has been added since the last record is part of the state, so a resumed run's history is that of an uninterrupted
    one.
    """

    def __init__(self):
        self._records: dict[str, list[np.ndarray]] = {"steps": []}
        self._pending: dict[str, np.ndarray] = {}
        self._count = 0

    def add(self, matching: Matching, mapping: LayerMapping) -> None:
        """Take in one step's flows, and what `mapping` wants recorded after it."""
        flows = {branch: getattr(matching, f"{branch}_flow") for branch in BRANCHES}
        for branch, flow in flows.items():
            if flow is not None:
                self._gather(f"{branch}_flow", flow, np.add)
        for name, value in mapping.recorded().items():
            if flows.get(name.partition("_")[0]) is not None:
                for kind, gather in (("", np.add), ("_min", np.minimum), ("_max", np.maximum)):
                    self._gather(name + kind, value, gather)
        self._count += 1

    def _gather(self, name: str, value: np.ndarray, gather: np.ufunc) -> None:
        self._pending[name] = gather(self._pending[name], value) if name in self._pending else value.astype(float)

    def record(self, step: int) -> None:
        """Close the interval that ends with `step`; nothing happens when no flow came in since the last record."""
        if not self._count:
            return
        for name, value in {"steps": np.array(step), **self._pending}.items():
            summed = name != "steps" and not name.endswith(("_min", "_max"))
            self._records.setdefault(name, []).append(value / self._count if summed else value)
        self._pending, self._count = {}, 0

    def save(self, folder: str | Path) -> None:
        """Write `flows.npz` into `folder`, the interval under way included."""
        arrays = {name: np.array(values) for name, values in self._records.items()}
        pending = {f"pending_{name}": value for name, value in self._pending.items()}
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
            self._pending = {
                name.removeprefix("pending_"): arrays[name]
                for name in arrays.files
                if name.startswith("pending_") and name != "pending_count"
            }
            self._records = {name: list(arrays[name]) for name in arrays.files if not name.startswith("pending_")}

    def write_weights(self, folder: str | Path) -> None:
        """Write `layer_weights.csv`: a row per record; per branch, side and layer (1-based) three columns, the mean
        since the record before, the minimum and the maximum."""
        names = [name for name in self._records if name.endswith("_weights")]
        columns = [
            (f"{name.removesuffix('_weights')}_{k + 1}{kind}", f"{name}{kind}", k)
            for name in names
            for k in range(len(self._records[name][0]))
            for kind in ("", "_min", "_max")
        ]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", *(title for title, _, _ in columns)])
        for row, step in enumerate(self._records["steps"]):
            writer.writerow([int(step), *(f"{self._records[name][row][k]:.6f}" for _, name, k in columns)])
        write_atomically(Path(folder) / "layer_weights.csv", text.getvalue())
