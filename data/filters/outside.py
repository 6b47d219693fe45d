"""What rules take from outside the recipe: lists, examples and models, checked, hashed and made ready once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gristmill.data.filters import blocklist, classifier, hub_classifier
from gristmill.data.filters.blocklist import BlocklistConfig
from gristmill.data.filters.classifier import QualityConfig
from gristmill.data.filters.hub_classifier import HubClassifierConfig
from gristmill.data.filters.profile import Profile
from gristmill.data.filters.rule import RuleConfig


def rules_in(profiles: Mapping[str, Profile]) -> Iterator[RuleConfig]:
    """The rules that are on, kind by kind."""
    for profile in profiles.values():
        yield from (value for name in Profile.model_fields if isinstance(value := getattr(profile, name), RuleConfig))


def outside_files(profiles: Mapping[str, Profile]) -> list[str]:
    """The files that rules are read from; their contents belong to the stage's key.

    Raises:
        ValueError: a pattern names no file.
    """
    found: dict[str, None] = {}
    for rule in rules_in(profiles):
        match rule:
            case BlocklistConfig():
                found |= dict.fromkeys(blocklist.rule_files(rule))
            case QualityConfig():
                found |= dict.fromkeys(classifier.rule_files(rule))
            case HubClassifierConfig():
                found |= dict.fromkeys(hub_classifier.rule_files(rule))
    return list(found)


def check_outside(profiles: Mapping[str, Profile]) -> None:
    """Refuse lists, examples and models that cannot be read, before anything runs.

    Raises:
        ValueError: with the file and what to do.
    """
    for rule in rules_in(profiles):
        match rule:
            case BlocklistConfig():
                blocklist.check_blocklist(rule)
            case QualityConfig():
                classifier.check_quality(rule)
            case HubClassifierConfig():
                hub_classifier.check_hub_classifier(rule)


def made_ready(profiles: Mapping[str, Profile], shards: Sequence[Path], folder: Path) -> dict[str, Profile]:
    """The profiles with classifiers trained into `folder`/<kind> and shares turned into scores, for tasks to apply.

    Args:
        shards: the documents to come, of which a sample is scored where a share is asked for.

    Raises:
        ValueError: examples are too few or cannot be read.
    """
    ready = {}
    for kind, profile in profiles.items():
        quality = profile.quality
        if quality is not None:
            own = classifier.resolve(quality, shards, folder / kind, kind)
            profile = profile.model_copy(update={"quality": own})
        ready[kind] = profile
    return ready


def reports(folder: Path) -> dict[str, Any]:
    """Metrics of the classifiers that `made_ready` left in a folder, by kind of document; none where there are none."""
    found = {p.name: classifier.Classifier.load(p).about["report"] for p in sorted(folder.glob("*")) if p.is_dir()}
    if not found:
        return {}
    return {f"quality_{name}": {kind: r[name] for kind, r in found.items()} for name in ("auc", "calibration_error")}
