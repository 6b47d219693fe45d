"""Taking documents out of a store: a tombstone, and every result that held them without them.

`remove` records tombstones; `settle` brings the store into line with them, and may be killed and called again. A
result that held a document is amended: a new result under the key that the same recipe has from now on (its sources
now hold a tombstone), with the shards touched written anew and every other file taken over as it is; then the old one
is removed. Decisions that were taken with the document stay: what was removed as its duplicate stays removed. What is
no corpus (a mixture, a checkpoint, a report) is left: it is made anew by the next run, and the old one is named among
those that saw the document, unless it shows the text, as a report may; then it goes.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from gristmill.data.amend import probes
from gristmill.data.urls import normalised_url
from gristmill.flows import tombstones
from gristmill.flows.amendment import Document, amend, shows_text
from gristmill.flows.corpus_results import Result, Row
from gristmill.flows.corpus_trace import locate, token_places, training
from gristmill.flows.errors import UsageError
from gristmill.flows.identity import key_of
from gristmill.flows.manifest import Manifest, identity_of
from gristmill.flows.store import KEY, Store

SPACE = re.compile(r"\s+")
LEAST_MATCH = 40  # characters, without white space, of a text by which documents are found
Say = Callable[[str], None]


@dataclass
class Target:
    """A document to take out, as the store has it."""

    identifier: str
    source: str
    url: str | None
    results: list[Row] = field(default_factory=list)  # trained on it: stage, key, steps, and what was made of those
    duplicates: list[str] = field(default_factory=list)  # removed by a stage because of it
    copy_of: list[str] = field(default_factory=list)  # because of which a stage removed it


@dataclass
class Settled:
    """What `settle` did.

    Attributes:
        amended: (stage, old key, new key, files written, files taken over).
        removed: (stage, key) of results that are gone, with why.
        left: results that are no longer what the recipe makes and stay: (stage, key).
    """

    amended: list[tuple[str, str, str, int, int]] = field(default_factory=list)
    removed: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


# --- finding


def ingested(store: Store) -> list[Result]:
    """Every finished result that came from sources."""
    results = (Result(store, m) for stage in store.stages() for m in store.manifests(stage))
    return [r for r in results if tombstones.source_names(r.manifest["config"]) and r.has_documents]


def find_targets(
    store: Store, identifiers: Iterable[str] = (), url: str | None = None, text: str | None = None
) -> list[Target]:
    """The documents of a store by their ids, by the URL they came from, or by a text that they hold.

    Args:
        url: in its one spelling (`normalised_url`).

    Ids are found by the indexes; a URL or a text is looked for in every document. A text is compared without its
    white space.
    """
    found: dict[str, Target] = {}
    squeezed = SPACE.sub("", text) if text is not None else None
    for result in ingested(store):
        if identifiers := list(identifiers):
            for identifier, (shard, _) in locate(result, identifiers).items():
                row = next((r for r in result.rows("documents", shard) if r["id"] == identifier), None)
                if row is not None:
                    _add(found, row)
        if url is None and squeezed is None:
            continue
        for shard in result.shards:
            for row in result.rows("documents", shard):
                if (url is not None and from_url(row, {url})) or (
                    squeezed is not None and squeezed in SPACE.sub("", row["text"])
                ):
                    _add(found, row)
    targets = sorted(found.values(), key=lambda t: t.identifier)
    _add_duplicates(store, found)
    _add_training(store, found)
    return targets


def from_url(row: Row, urls: Collection[str]) -> bool:
    """Whether a document came from one of some URLs, which are in their one spelling."""
    url = row["metadata"].get("url")
    return url is not None and normalised_url(url) in urls


def _add(found: dict[str, Target], row: Row) -> None:
    metadata = row["metadata"]
    found.setdefault(row["id"], Target(row["id"], metadata["source"], metadata.get("url")))


def _add_duplicates(store: Store, found: dict[str, Target]) -> None:
    """Name what was removed because of a target, and because of what a target was: the removed rows say so."""
    for result in _everything(store).values() if found else ():
        for shard in result.shards:
            for row in result.rows("removed", shard):
                kept = (row.get("because") or {}).get("duplicate_of")
                if kept in found and row["id"] not in found[kept].duplicates:
                    found[kept].duplicates.append(row["id"])
                if kept and row["id"] in found and kept not in found[row["id"]].copy_of:
                    found[row["id"]].copy_of.append(kept)
    for target in found.values():
        target.duplicates.sort()


def _add_training(store: Store, found: dict[str, Target]) -> None:
    for result in _everything(store).values() if found else ():
        if "tokens/index.json" not in result.files:
            continue
        for identifier, places in token_places(result, found).items():
            for row in training(store, result, places):
                seen = {"steps": row["steps"], "held_out": row["held_out"]}
                rows = [{"stage": row["stage"], "key": row["key"], **seen}]
                rows += [{**d, "made_of": row["key"]} for d in row["used_for"]]
                target = found[identifier]
                target.results += [r for r in rows if r not in target.results]


def _everything(store: Store) -> dict[tuple[str, str], Result]:
    """Every finished result by stage and key, each after those it was made of."""
    manifests = {(m["stage"], m["key"]): m for stage in store.stages() for m in store.manifests(stage)}
    ordered: dict[tuple[str, str], Result] = {}

    def visit(at: tuple[str, str]) -> None:
        if at in manifests and at not in ordered:
            for entry in manifests[at]["inputs"].values():
                visit((entry["stage"], entry["key"]))
            ordered[at] = Result(store, manifests[at])

    for at in sorted(manifests):
        visit(at)
    return ordered


# --- recording


def graves(targets: Iterable[Target], url: str | None, reason: str, absent: Iterable[str] = ()) -> list[Row]:
    """The tombstones of documents, of ids that none has yet, and of a URL, which is honoured under any id."""
    said = {"reason": reason, "when": datetime.now(UTC).isoformat(timespec="seconds"), "who": _user()}
    rows: list[Row] = [
        {"id": t.identifier, "from_url": t.url, "results": t.results, "duplicates": t.duplicates, **said}
        for t in targets
    ]
    rows += [{"id": identifier, "from_url": None, "results": [], "duplicates": [], **said} for identifier in absent]
    return [*rows, {"url": url, **said}] if url is not None else rows


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


# --- bringing the store into line


def settle(store: Store, say: Say = print) -> Settled:
    """Amend every result that tombstones concern, then remove the old ones; the caller holds the store's lock.

    Killed at any moment and called again it ends in the same state: new results count once their manifest is there,
    old ones go last, those that were made of others first.
    """
    rows, done = tombstones.read(store), Settled()
    everything = _everything(store)
    changes = _Changes(store, rows, everything)
    for at, result in everything.items():
        changes.consider(at, result, done, say)
    _discard_shown(store, changes, done, say)
    for at, result in reversed(everything.items()):
        if changes.held(result):
            store.discard(*at)
            done.removed.append((*at, "it held what was taken out"))
    if changes.documents:
        _discard_unfinished(store, {stage for stage, _ in changes.became}, done, say)
    _record_runs(store, changes)
    return done


class _Changes:
    """Which result becomes which, and what of the documents taken out is still in each."""

    def __init__(self, store: Store, rows: list[Row], everything: dict[tuple[str, str], Result]) -> None:
        self.store, self.rows = store, rows
        self.became: dict[tuple[str, str], Manifest] = {}
        self.documents: dict[tuple[str, str], dict[str, Document]] = {}
        self.touched: set[tuple[str, str]] = set()
        self.stale: list[tuple[str, str]] = []
        self.texts: dict[str, str] = {}
        for (stage, _), result in everything.items():
            if amended := result.manifest.get(
                "amended"
            ):  # by an earlier call that was killed, or by an earlier removal
                self.became[stage, amended["from"]] = result.manifest

    def consider(self, at: tuple[str, str], result: Result, done: Settled, say: Say) -> None:
        """Amend one result, if anything in its identity changed."""
        manifest = result.manifest
        identity = self._identity(manifest)
        if key_of(identity) == result.key:
            return
        is_source = bool(tombstones.source_names(manifest["config"])) and result.has_documents
        documents = self._taken(result) if is_source else self._inherited(manifest)
        same_inputs = all(
            self._input(entry)["content_hash"] == entry.get("content_hash") for entry in manifest["inputs"].values()
        )
        is_corpus = is_source or result.has_documents or "tokens/index.json" in result.files
        if not is_corpus and not same_inputs:
            self.stale.append(at)
            done.left.append(at)
            return
        self.documents[at] = documents
        if documents:
            self.touched.add(at)
        self.texts |= {i: d.first_text for i, d in documents.items()}
        there = self.store.manifest(result.stage, key_of(identity))
        if there is not None:
            self.became[at] = there
            self.documents[at] = amend(result, identity, {}, documents, write=False).documents
            return
        inputs = {
            name: {**entry, "content_hash": self._input(entry).get("content_hash", "")}
            for name, entry in identity["inputs"].items()
        }
        made = amend(result, identity, inputs, documents, asked=tombstones.applying(self.rows, manifest["config"]))
        self.became[at], self.documents[at] = made.manifest, made.documents
        taken_over = len(made.manifest["files"]) - len(made.written)
        done.amended.append((result.stage, result.key, made.manifest["key"], len(made.written), taken_over))
        say(f"{result.name} → {made.manifest['key']}: {len(made.written)} files written, {taken_over} taken over")

    def held(self, result: Result) -> bool:
        """Whether a result that became another one holds what was taken out."""
        at = (result.stage, result.key)
        record = self.became.get(at, {}).get("amended", {})
        return at in self.touched or (record.get("from") == result.key and bool(record["documents"]))

    def _identity(self, manifest: Manifest) -> Row:
        """What the result would be asked for by now."""
        identity = identity_of(manifest)
        if tombstones.source_names(manifest["config"]) and not manifest["inputs"]:
            sources = {name: held for name, held in identity["sources"].items() if name != tombstones.SOURCE}
            identity["sources"] = sources | tombstones.as_source(tombstones.applying(self.rows, manifest["config"]))
        identity["inputs"] = {
            name: {"stage": entry["stage"], "key": self._newest(entry)} for name, entry in identity["inputs"].items()
        }
        return identity

    def _newest(self, entry: Row) -> str:
        key, seen = entry["key"], set()
        while (entry["stage"], key) in self.became and key not in seen:
            seen.add(key)
            key = self.became[entry["stage"], key]["key"]
        return key

    def _input(self, entry: Row) -> Row:
        """The manifest of what an input became; what the entry itself says where it is no longer there."""
        return self.store.manifest(entry["stage"], self._newest(entry)) or entry

    def _taken(self, result: Result) -> dict[str, Document]:
        """Documents of a result from sources that a tombstone names."""
        asked = tombstones.applying(self.rows, result.manifest["config"])
        places = locate(result, asked["ids"])
        wanted = {shard for shard, _ in places.values()}
        urls = set(asked["urls"])
        found = {}
        for shard in result.shards:
            if not urls and shard not in wanted:
                continue
            for row in result.rows("documents", shard):
                if row["id"] in places or (urls and from_url(row, urls)):
                    found[row["id"]] = Document(row["id"], row["metadata"]["source"], shard, row["text"], row["text"])
        return found

    def _inherited(self, manifest: Manifest) -> dict[str, Document]:
        found: dict[str, Document] = {}
        for entry in manifest["inputs"].values():
            found |= self.documents.get((entry["stage"], entry["key"]), {})
        return found


def _discard_shown(store: Store, changes: _Changes, done: Settled, say: Say) -> None:
    """Remove results that are no corpus and show a text that was taken out: the next run makes them anew."""
    pieces = [piece for text in changes.texts.values() for piece in probes(text)]
    for stage, key in changes.stale:
        result = Result(store, store.manifest(stage, key) or {})
        shown = shows_text(result, pieces) if pieces else None
        if shown is not None:
            store.discard(stage, key)
            done.left.remove((stage, key))
            done.removed.append((stage, key, f"its {shown} showed the text"))
            say(f"{stage} {key} is removed: its {shown} showed the text")


def _discard_unfinished(store: Store, stages: set[str], done: Settled, say: Say) -> None:
    """Remove unfinished work of the corpus stages, which may hold what was taken out."""
    for stage in sorted(stages):
        names = store.far.names(stage) if store.remote else []
        keys = {n.removesuffix(".partial") for n in names if n.endswith(".partial")}
        local = store.local / stage
        keys |= {p.name for p in local.iterdir() if KEY.fullmatch(p.name)} if local.is_dir() else set()
        for key in sorted(keys):
            if store.manifest(stage, key) is None and store.partial(stage, key):
                store.discard(stage, key)
                done.removed.append((stage, key, "unfinished work, which may hold what was taken out"))
                say(f"{stage} {key}: unfinished work is removed, since it may hold what was taken out")


def _record_runs(store: Store, changes: _Changes) -> None:
    """A run of its own for each recipe whose latest run names results that became others.

    The latest run is then whole again: `verify` and `show` find its results.
    """
    latest: dict[str, Row] = {}
    for record in store.runs():
        latest[record["recipe"]] = record
    for record in sorted(latest.values(), key=lambda r: r["started"]):
        now = [_entry_now(store, changes, entry) for entry in record["stages"]]
        if not any(new and new["key"] != old["key"] for new, old in zip(now, record["stages"], strict=True)):
            continue
        moment = datetime.now(UTC)
        run = f"{moment.strftime('%Y%m%dT%H%M%S')}-{key_of({'of': record['run'], 'stages': now})[:6]}"
        kept = [entry for entry in now if entry is not None]
        amended = {"run": run, "started": moment.timestamp(), "seconds": 0.0, "user": _user(), "stages": kept}
        store.record_run({**record, **amended, "state": "completed", "amends": record["run"]})


def _entry_now(store: Store, changes: _Changes, entry: Row) -> Row | None:
    """A stage of a run's record as it is by now; none where its result is gone or no longer the recipe's."""
    at = (entry["stage"], entry["key"])
    key = changes._newest({"stage": at[0], "key": at[1]})
    if key != at[1]:
        manifest = store.manifest(at[0], key)
        reason = f"amended: {tombstones.TOMBSTONES}"
        content = manifest["content_hash"] if manifest else ""
        return {**entry, "key": key, "state": "completed", "reason": reason, "content_hash": content}
    if at in changes.stale or store.manifest(*at) is None:
        return None
    return entry


def text_of(path: Path) -> str:
    """The text of a file that documents are compared with.

    Raises:
        UsageError: it is not there, not UTF-8, or holds too little to tell one document from another.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--match {str(path)!r} cannot be read ({error}): name a file of UTF-8 text") from error
    if len(SPACE.sub("", text)) < LEAST_MATCH:
        raise UsageError(
            f"--match {str(path)!r} holds fewer than {LEAST_MATCH} characters: too many documents may hold it"
        )
    return text
