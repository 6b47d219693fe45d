"""Reading a store for people: results, runs, verification, and where a model and its tokenizer lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gristmill.flows.errors import UsageError
from gristmill.flows.lineage import descendants, lineage
from gristmill.flows.manifest import Manifest
from gristmill.flows.runners import known
from gristmill.flows.store import Store
from gristmill.flows.terminal import duration, size

SAMPLES = 5


def latest_run(store: Store) -> dict[str, Any]:
    """The newest run's record.

    Raises:
        UsageError: the store has no run.
    """
    runs = store.runs()
    if not runs:
        raise UsageError(f"store {store.uri!r} has no run: start one with `gristmill run tiny` or name another --store")
    return runs[-1]


def find(store: Store, what: str) -> tuple[str, dict[str, Any]]:
    """("run", record) or ("stage", manifest) of what a person named; a stage's is that of the latest run with it.

    Raises:
        UsageError: there is neither.
    """
    runs = store.runs()
    for record in reversed(runs):
        if record["run"] == what:
            return "run", record
    for record in reversed(runs):
        for entry in record["stages"]:
            if what in (entry["stage"], entry["key"]):
                manifest = store.manifest(entry["stage"], entry["key"])
                if manifest is not None:
                    return "stage", manifest
    latest_run(store)
    names = sorted({e["stage"] for r in runs for e in r["stages"]})
    known(what, names, "show")
    raise UsageError(f"stage {what!r} has no finished result in store {store.uri!r}: run it first")


def find_result(store: Store, what: str) -> Manifest:
    """The manifest of a stage's result in the latest run that has one, or of a result by its key.

    Raises:
        UsageError: there is none.
    """
    if (manifest := store.find(what)) is not None:
        return manifest
    kind, found = find(store, what)
    if kind == "run":
        raise UsageError(f"{what!r} is a run: name one of its stages, see `gristmill show {what}`")
    return found


def describe_run(record: dict[str, Any]) -> str:
    """A run in lines."""
    lines = [
        f"run     {record['run']}",
        f"recipe  {record['recipe']}",
        f"state   {record['state']}" + (f" ({record['error']})" if record.get("error") else ""),
        f"took    {duration(record.get('seconds', 0.0))}",
    ]
    lines += [f"  {e['stage']:<13} {e['state']:<10} {e['key']}" for e in record["stages"]]
    return "\n".join(lines)


def describe_stage(store: Store, manifest: dict[str, Any]) -> str:
    """A stage's manifest, metrics and first samples in lines."""
    folder = store.folder(manifest["stage"], manifest["key"])
    held = sum(f["bytes"] for f in manifest["files"])
    lines = [
        f"stage    {manifest['stage']} version {manifest['version']}, {manifest['title']}",
        f"key      {manifest['key']}",
        f"content  {manifest['content_hash']}",
        f"folder   {folder}",
        f"took     {duration(manifest['seconds'])}, {manifest['attempts']} start(s)",
        f"holds    {len(manifest['files'])} files, {size(held)}",
        "inputs   " + (", ".join(f"{n} = {i['stage']} {i['key']}" for n, i in manifest["inputs"].items()) or "none"),
        "metrics",
    ]
    for name, value in manifest["metrics"].items():
        if isinstance(value, dict):
            lines += [f"  {name}", *(f"    {k:<28} {v:,}" for k, v in value.items())]
        else:
            lines.append(f"  {name:<30} {value:,}" if isinstance(value, int | float) else f"  {name:<30} {value}")
    store.fetch(manifest, shown_only=True)
    samples = folder / "samples.jsonl"
    if samples.exists():
        lines.append("samples")
        for line in samples.read_text(encoding="utf-8").splitlines()[:SAMPLES]:
            row = json.loads(line)
            lines += ["  " + ", ".join(f"{k}: {_short(v)}" for k, v in row.items())]
    return "\n".join(lines)


def _short(value: Any, characters: int = 100) -> str:
    text = " ⏎ ".join(str(value).split("\n"))
    return text if len(text) <= characters else f"{text[:characters]}…"


def describe_lineage(store: Store, manifest: Manifest) -> str:
    """What a result was made of, down to what its sources held, and what was made of it."""
    lines = [f"{manifest['stage']} {manifest['key']} was made of"]
    for node in lineage(store, manifest["key"])[1:]:
        gone = "  (removed from the store)" if node.get("removed") else ""
        lines.append(f"  {node['stage']:<13} {node['key']}  content {node['content_hash'][:16]}{gone}")
        lines += [f"    source {name} {held[:16]}" for name, held in node["sources"].items()]
    lines += [f"  source {name} {held[:16]}" for name, held in manifest["sources"].items()]
    after = descendants(store, manifest["key"])
    lines.append("and was used for" if after else "and was used for nothing")
    return "\n".join([*lines, *(f"  {d['stage']:<13} {d['key']}" for d in after)])


def state_of(record: dict[str, Any], running: bool) -> str:
    """A run's state; one that says it runs while nobody holds the store was killed.

    Args:
        running: whether somebody holds the store.
    """
    return "killed" if record["state"] == "running" and not running else record["state"]


def verify_store(store: Store) -> dict[str, Any]:
    """Content hash of each stage of the latest run, and all that is damaged in the whole store.

    `notes`, where there are any, name results whose input was made again since with other bytes: same recipe, other
    rounding.
    """
    latest_run(store)
    found = store.verify()
    shown = {"stages": found["stages"], "bad": found["bad"]}
    return {**shown, "notes": found["notes"]} if found["notes"] else shown


def _ready(store: Store, manifest: dict[str, Any]) -> list[str]:
    """Bring a result's files into its local folder; what is wrong with them."""
    return store.fetch(manifest) if store.remote else store.damage(manifest)


def chat_folders(store: Store, checkpoint: str) -> tuple[Path, Path]:
    """(model, tokenizer) folders of a stage of the latest run, or of a path to a stage's folder or its model/.

    Raises:
        UsageError: there is no model there, or its tokenizer cannot be found.
    """
    path = Path(checkpoint)
    if path.exists():
        stage = path if (path / "model").is_dir() else path.parent
        at = stage / "manifest.json"
        if not at.exists():
            raise UsageError(f"{checkpoint!r} is no finished stage's folder: name rl, cold_start, pretrain or a folder")
        manifest = json.loads(at.read_text(encoding="utf-8"))
        store = Store(stage.parent.parent)
    else:
        _, manifest = find(store, checkpoint)
    if wrong := _ready(store, manifest):
        raise UsageError(f"{manifest['stage']} {manifest['key']} is damaged: {wrong[0]}; run it again")
    model = store.folder(manifest["stage"], manifest["key"]) / "model"
    if not model.is_dir():
        raise UsageError(f"stage {manifest['stage']!r} holds no model: name pretrain, cold_start, rl_zero or rl")
    inputs = manifest["inputs"]
    entry = inputs.get("tokenizer") or inputs.get("tokens")
    tokens = store.manifest(entry["stage"], entry["key"]) if entry else None
    if tokens is None:
        raise UsageError(
            f"the tokenizer of {manifest['stage']} {manifest['key']} is not in the store: run tokenize again"
        )
    if wrong := _ready(store, tokens):
        raise UsageError(f"{tokens['stage']} {tokens['key']} is damaged: {wrong[0]}; run it again")
    return model, store.folder(tokens["stage"], tokens["key"]) / "tokenizer"
