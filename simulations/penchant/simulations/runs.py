"""The folder of one run: what is in it, and how it survives being stopped at any moment.

    config.toml          everything that decides the run; `penchant simulate --config` repeats it
    results.json         the rows, once all are there (schema_version 1, see docs/results-format.md)
    rounds.jsonl         a line for each round of each federated row
    report.html          one self-contained file to look at
    audit.json           what canaries showed about each private row, where the run was audited (see docs/audit.md)
    models/ROW.*         what each federated row would release: safetensors, and a manifest in JSON
    rows/ROW.json|npz    a finished row, and its figures for each person (for paired comparisons)
    partial/ROW.*        the checkpoint of the row that was interrupted
    ledgers/ROW.sqlite   what a row with server noise was charged, kept as long as the run: a row done again is charged
                         again (see `penchant privacy`)

Every file is written beside its name and moved there, so that it is whole or absent; a ledger only grows.
"""

from __future__ import annotations

import json
import os
import shlex
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from penchant.common import config
from penchant.common.arrays import Float64, Int64
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.learners.contract import State
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan
from penchant.server.rounds import Progress, RoundRecord
from penchant.simulations.settings import SimulationConfig

SCHEMA_VERSION = 1


class RunFolder:
    """One run's folder.

    Args:
        path: of the folder; made when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    # what decides the run

    def write_config(self, settings: SimulationConfig) -> None:
        record = {"schema_version": SCHEMA_VERSION, "simulation": config.encode(settings)}
        self._write("config.toml", tomli_w.dumps(record).encode())

    def read_config(self) -> SimulationConfig:
        """The settings of the run.

        Raises:
            InvalidConfig: there is none, or it cannot be read.
        """
        return read_config(self.path / "config.toml")

    def holds_other(self, settings: SimulationConfig) -> bool:
        """Whether a run with other settings is here, whose rows must not be taken for these."""
        return (self.path / "config.toml").exists() and self.read_config() != settings

    # finished rows

    def write_row(self, row: Mapping[str, Any], users: Int64, per_user: Mapping[str, Float64]) -> None:
        name = file_name(row["name"])
        self._save_arrays(f"rows/{name}.npz", {"users": users, **per_user})
        self._write(f"rows/{name}.json", _json(row))

    def read_row(self, name: str) -> dict[str, Any] | None:
        """A finished row; None where it is not finished.

        Raises:
            MalformedData: its file is damaged.
        """
        path = self.path / "rows" / f"{file_name(name)}.json"
        return self._read_json(path) if path.exists() else None

    def per_user(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """The figures of each person of a finished row: "users", and float64[m] for each metric.

        Raises:
            MalformedData: its file is absent or damaged.
        """
        path = self.path / "rows" / f"{file_name(name)}.npz"
        try:
            with path.open("rb") as file, np.load(file) as columns:
                return {key: columns[key] for key in columns.files}
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile):
            raise self._damaged(path, "the .json beside it") from None

    def ledger(self, row: str, plan: PrivacyPlan) -> Ledger:
        """What the row was charged; in a file where the server adds noise, and else there is nothing to charge.

        Raises:
            InvalidConfig, MalformedData, PrivacyRefused: as the ledger does; nothing may be released.
        """
        path = self.path / "ledgers" / f"{file_name(row)}.sqlite"
        return Ledger(plan.population, delta=plan.delta, path=path if plan.unit == "user" else None)

    # the row at work

    def write_partial(self, row: str, progress: Progress, curve: list[dict[str, Any]]) -> None:
        """The checkpoint after a round, in one file."""
        record = {
            "done": progress.done,
            "curve": curve,
            "records": [asdict(r) for r in progress.records],
        }
        arrays = {f"state/{name}": np.asarray(v, order="C") for name, v in progress.state.items()}
        arrays["participations"] = progress.participations
        metadata = {"progress": json.dumps(record)}
        self._write(f"partial/{file_name(row)}.safetensors", save(arrays, metadata))

    def read_partial(self, row: str) -> tuple[Progress, list[dict[str, Any]]] | None:
        """The checkpoint of an interrupted row, and its curve; None where there is none.

        Raises:
            MalformedData: its file is damaged.
        """
        path = self.path / "partial" / f"{file_name(row)}.safetensors"
        if not path.exists():
            return None
        try:
            arrays = load_file(path)
            record = json.loads(_metadata(path)["progress"])
            state = {name.removeprefix("state/"): v for name, v in arrays.items() if name.startswith("state/")}
            records = [RoundRecord(**r) for r in record["records"]]
            progress = Progress(state, arrays["participations"], record["done"], records)
            return progress, record["curve"]
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise self._damaged(path) from None

    def drop_partial(self, row: str) -> None:
        (self.path / "partial" / f"{file_name(row)}.safetensors").unlink(missing_ok=True)

    def write_rounds(self, lines: list[Mapping[str, Any]]) -> None:
        """rounds.jsonl, whole and new each time: it is small, and so never torn."""
        self._write("rounds.jsonl", b"".join(_json(line, indent=None) for line in lines))

    # what the run leaves behind

    def write_model(self, row: str, state: State, manifest: Mapping[str, Any]) -> None:
        arrays = {name: np.asarray(values, order="C") for name, values in state.items()}
        self._write(f"models/{file_name(row)}.safetensors", save(arrays))
        self._write(f"models/{file_name(row)}.json", _json(manifest))

    def read_model(self, row: str) -> tuple[State, dict[str, Any]]:
        """What a row released, and its manifest.

        Raises:
            InvalidConfig: the run has no such model; the message names those it has.
            MalformedData: a file of it is damaged.
        """
        folder = self.path / "models"
        path = folder / f"{file_name(row)}.json"
        if not path.exists():
            known = sorted(self._read_json(p).get("name", p.stem) for p in folder.glob("*.json"))
            raise InvalidConfig(f"no model {row!r} in {self.path}{config.did_you_mean(row, known)}")
        try:
            return load_file(path.with_suffix(".safetensors")), self._read_json(path)
        except (OSError, SafetensorError):
            raise MalformedData(f"{path.with_suffix('.safetensors')} is damaged or absent: run it again") from None

    def write_results(self, results: Mapping[str, Any], report: str) -> None:
        self.write_report(report)
        self._write("results.json", _json(results))

    def write_report(self, report: str) -> None:
        self._write("report.html", report.encode())

    def write_audit(self, record: Mapping[str, Any]) -> None:
        self._write("audit.json", _json(record))

    def read_audit(self) -> dict[str, Any] | None:
        """audit.json; None where the run was not audited.

        Raises:
            MalformedData: the file is damaged.
        """
        path = self.path / "audit.json"
        return self._read_json(path) if path.exists() else None

    def read_results(self) -> dict[str, Any]:
        """results.json.

        Raises:
            InvalidConfig: the folder holds no finished run.
            MalformedData: the file is damaged, or of a version that is unknown here.
        """
        path = self.path / "results.json"
        if not path.exists():
            again = f"; go on with: {self._resume}" if (self.path / "config.toml").exists() else ""
            raise InvalidConfig(f"{self.path} holds no finished run{again}")
        record = self._read_json(path)
        if record.get("schema_version") != SCHEMA_VERSION:
            raise MalformedData(f"{path}: results version {record.get('schema_version')!r} is unknown here")
        return record

    def _save_arrays(self, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        import io

        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # its stub takes the first keyword for allow_pickle
        self._write(name, buffer.getvalue())

    def _write(self, name: str, content: bytes) -> None:
        write_file(self.path / name, content)

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise self._damaged(path) from None
        if not isinstance(record, dict):
            raise self._damaged(path)
        return record

    def _damaged(self, path: Path, delete: str = "it") -> MalformedData:
        return MalformedData(f"{path} is damaged: delete {delete} and go on with: {self._resume}")

    @property
    def _resume(self) -> str:
        return f"penchant simulate --resume {shlex.quote(str(self.path))}"


def write_file(path: Path, content: bytes) -> None:
    """Writes it beside its name and moves it there, so that it is whole or absent; makes its folder.

    Raises:
        InvalidConfig: it cannot be written there.
    """
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        raise InvalidConfig(f"cannot write {path}: {error.strerror}; take another --out") from None


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """As `write_file`."""
    write_file(path, _json(record))


def read_config(path: Path) -> SimulationConfig:
    """The simulation that a config.toml describes.

    Raises:
        InvalidConfig: no such file, not TOML, an unknown key or version.
    """
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfig(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not even UTF-8
        raise InvalidConfig(f"{path}: {error}") from None
    if (version := record.pop("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION:
        raise InvalidConfig(f"{path}: config version {version!r} is unknown here; update penchant")
    if extra := set(record) - {"simulation"}:
        raise InvalidConfig(
            f"{path}: unknown table {sorted(extra)[0]!r}{config.did_you_mean(min(extra), ['simulation'])}"
        )
    return config.decode(SimulationConfig, record.get("simulation", {}))


def file_name(row: str) -> str:
    """A row's name as a file name.

    >>> file_name("co-occurrence (exact)")
    'co-occurrence-exact'
    """
    return "-".join("".join(c if c.isalnum() or c in "+-" else " " for c in row).split())


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def _json(record: Mapping[str, Any], indent: int | None = 1) -> bytes:
    return (json.dumps(record, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()
