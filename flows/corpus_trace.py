"""One document through all stages of a run: from its source to the training steps that read it, and what followed.

The indexes of ids find its shard; the shard's files of each stage say what was decided; the token shards' own ids find
its tokens, the mixture the sequences and positions that read them, and the lineage what was made of those.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gristmill.data.documents import id_hash
from gristmill.flows import tombstones
from gristmill.flows.corpus_results import Result, Row, chain_of_run, results_of
from gristmill.flows.errors import UsageError
from gristmill.flows.lineage import descendants
from gristmill.flows.manifest import Manifest
from gristmill.flows.store import Store
from gristmill.model.batch_sizes import BatchSizes
from gristmill.model.training.config import BatchRampConfig

FEW_STEPS = 20  # steps and positions listed one by one


def trace(store: Store, record: Row, identifier: str) -> Row:
    """What became of a document in a run.

    Returns:
        `id`, `run`, `tombstone` (or null), `source`, `url`, `shard` and `place` in it, `stages` (a row a stage:
        `outcome` kept, changed, removed or absent, with `reason`, `because`, `edits`), `tokens` (where they lie) and
        `trained` (a row a training result: split, sequences' positions, steps, and what was made of it).

    Raises:
        UsageError: the run never had it, and no tombstone names it.
    """
    chain = chain_of_run(store, record)
    grave = next((row for row in tombstones.read(store) if row.get("id") == identifier), None)
    found: Row = {"id": identifier, "run": record["run"], "tombstone": grave, "stages": [], "tokens": [], "trained": []}
    at = locate(chain[0], [identifier]).get(identifier)
    if at is None:
        if grave is None:
            raise UsageError(
                f"no document of run {record['run']} has the id {identifier!r}: ids are source/name, see "
                f"`gristmill data show {chain[0].stage}`"
            )
        return found
    shard, place = at
    found |= {"shard": shard, "place": place}
    for result in chain:
        step = decision(result, shard, identifier)
        metadata = step.pop("metadata", {})
        if result is chain[0]:
            found |= {"source": metadata.get("source"), "url": metadata.get("url"), "metadata": metadata}
        found["stages"].append(step)
        if step["outcome"] in ("removed", "absent"):
            return found
    found["tokens"], found["trained"] = _onwards(store, results_of(store, record), chain[-1], identifier)
    return found


def locate(ingested: Result, identifiers: Iterable[str]) -> dict[str, tuple[str, int]]:
    """(shard, place) of each document that is there, by the index of ids: no text is read."""
    import numpy as np

    by_hash = {id_hash(identifier): identifier for identifier in identifiers}
    wanted = np.array(list(by_hash), dtype=np.uint64)
    found = {}
    for name in ingested.shards:
        hashes = ingested.hashes(name)
        for place in np.flatnonzero(np.isin(hashes, wanted)):
            found[by_hash[int(hashes[place])]] = (name, int(place))
    return found


def decision(result: Result, shard: str, identifier: str) -> Row:
    """What a stage did with a document of one shard: `stage`, `key`, `outcome`, `text` after, and why."""
    step: Row = {"stage": result.stage, "key": result.key, "outcome": "absent"}
    for row in result.rows("removed", shard):
        if row["id"] == identifier:
            why = {"reason": row["reason"], "because": row.get("because") or {}}
            return {**step, "outcome": "removed", **why, "text": row["text"], "metadata": row["metadata"]}
    for row in result.rows("documents", shard):
        if row["id"] == identifier:
            step |= {"outcome": "kept", "text": row["text"], "metadata": row["metadata"]}
            break
    for row in result.rows("changed", shard):
        if row["id"] == identifier:
            step |= {"outcome": "changed", "edits": row["edits"]}
    return step


def _onwards(store: Store, results: list[Result], last: Result, identifier: str) -> tuple[list[Row], list[Row]]:
    tokens = next((r for r in results if _made_of(r.manifest, last) and "tokens/index.json" in r.files), None)
    if tokens is None:
        return [], []
    places = token_places(tokens, [identifier]).get(identifier, [])
    return [{"stage": tokens.stage, "key": tokens.key, **place} for place in places], training(store, tokens, places)


def _made_of(manifest: Manifest, result: Result) -> bool:
    return any(entry["key"] == result.key for entry in manifest["inputs"].values())


def folder_of(result: Result) -> Path | str:
    """Where a result's files can be read in pieces: its folder, or its address on a remote store."""
    place = f"{result.stage}/{result.key}"
    return f"{result.store.uri}/{place}" if result.store.remote else result.store.local / place


def below(folder: Path | str, name: str) -> Path | str:
    """A folder inside a place that may be a path or an address."""
    return folder / name if isinstance(folder, Path) else f"{folder}/{name}"


def token_places(tokens: Result, identifiers: Iterable[str]) -> dict[str, list[Row]]:
    """Of each document: the places of its tokens (split, source, shard, document, start, tokens)."""
    from gristmill.data.shards import TokenShards

    shards = TokenShards(below(folder_of(tokens), "tokens"))
    return {identifier: [vars(at) for at in shards.find(id_hash(identifier))] for identifier in identifiers}


def training(store: Store, tokens: Result, places: list[Row]) -> list[Row]:
    """Of each training result over these token shards: which of its steps read the places, and what was made of it."""
    found = []
    if not places:
        return found
    for manifest in (m for stage in store.stages() for m in store.manifests(stage)):
        if "mixture" not in manifest["inputs"] or manifest["inputs"].get("tokens", {}).get("key") != tokens.key:
            continue
        mixed = Result(store, manifest).input("mixture")
        if mixed is None:
            continue
        positions = {split: _positions(tokens, mixed, places, split) for split in ("train", "held_out")}
        batches, last = _batches(manifest["config"]), manifest["config"]["steps"]
        steps = sorted({batches.step_of(p) for p in positions["train"]})
        found.append(
            {
                "stage": manifest["stage"],
                "key": manifest["key"],
                "mixture": mixed.key,
                "positions": positions["train"],
                "steps": [step for step in steps if step < last],
                "held_out": bool(positions["held_out"]),
                "used_for": [d for d in descendants(store, manifest["key"]) if is_checkpoint(store, d)],
            }
        )
    return found


def _batches(config: Row) -> BatchSizes:
    """Of a training stage's configuration as its manifest holds it; one from before ramps were has none."""
    ramp = config.get("batch_ramp")
    return BatchSizes(
        config["batch_sequences"], config["sequence_length"], None if ramp is None else BatchRampConfig(**ramp)
    )


def is_checkpoint(store: Store, entry: Row) -> bool:
    """Whether a result holds a model's weights."""
    manifest = store.manifest(entry["stage"], entry["key"])
    return manifest is not None and any(
        part.startswith("model") for f in manifest["files"] for part in f["path"].split("/")
    )


def _positions(tokens: Result, mixed: Result, places: list[Row], split: str) -> list[int]:
    from gristmill.data.mixture import Mixture
    from gristmill.data.shards import TokenShards

    mixture = Mixture(folder_of(mixed), TokenShards(below(folder_of(tokens), "tokens")))
    found: set[int] = set()
    for at in places:
        if at["split"] == split and at["tokens"]:
            found.update(mixture.where(split, at["source"], at["shard"], at["start"], at["start"] + at["tokens"] - 1))
    return sorted(found)


def describe(found: Row) -> list[str]:
    """A trace in lines."""
    lines = [f"document {found['id']}", f"run      {found['run']}"]
    if grave := found["tombstone"]:
        lines.append(
            f"taken out of this store by {grave['who']} at {grave['when']}: {grave['reason'] or 'no reason given'}"
        )
        lines += [f"  seen by {_seen(row)}" for row in grave.get("results", [])]
    if "shard" in found:
        url = f", url {found['url']}" if found.get("url") else ""
        lines.append(f"source   {found['source']}{url}; shard {found['shard']}, row {found['place']}")
    lines += [line for step in found["stages"] for line in _step_lines(step)]
    for at in found["tokens"]:
        lines.append(
            f"  {at['stage']:<14} {at['tokens']:,} tokens from {at['start']:,} of {at['split']}/{at['source']} shard "
            f"{at['shard']}, its document {at['document']:,}"
        )
    for row in found["trained"]:
        lines.append(f"  {row['stage']:<14} {_read_in(row)}")
        lines += [f"  {d['stage']:<14} {d['key']}  made of {row['stage']} {row['key']}" for d in row["used_for"]]
    return lines


def _step_lines(step: Row) -> list[str]:
    lines = [f"  {step['stage']:<14} {step['outcome']:<8} {step.get('reason', '')}".rstrip()]
    for name, value in step.get("because", {}).items():
        if name != "spans":
            lines.append(f"  {'':<14} {name.replace('_', ' ')}: {value}")
    for edit in step.get("edits", []):
        was = "removed" if not edit["now"] else f"→ {edit['now']!r}"
        lines.append(f"  {'':<14} characters [{edit['start']}, {edit['end']}) {was} ({edit['reason']})")
    return lines


def _read_in(row: Row) -> str:
    if not row["steps"]:
        held = "held out: measured on, not trained on" if row["held_out"] else "in no training step"
        return f"{row['key']}  {held}"
    return f"{row['key']}  {steps_said(row['steps'])}; {len(row['positions'])} packed sequences"


def steps_said(steps: list[int]) -> str:
    """Training steps, counted from 1 as a curve's are."""
    shown = ", ".join(str(step + 1) for step in steps[:FEW_STEPS])
    more = f" and {len(steps) - FEW_STEPS} more" if len(steps) > FEW_STEPS else ""
    return f"{'step' if len(steps) == 1 else 'steps'} {shown}{more}"


def _seen(row: Row) -> str:
    steps = f" in {steps_said(row['steps'])}" if row.get("steps") else ""
    return f"{row['stage']} {row['key']}{steps}"
