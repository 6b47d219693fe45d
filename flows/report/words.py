"""The report's plain words, each sentence computed from the numbers: what they do not show is not said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gristmill.flows.cards.charts import MODEL_NAMES
from gristmill.flows.report.findings import thought_growth

ENOUGH = 20  # answers of a kind before a sentence is made of them


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{value * 100:+.1f}".replace("-", "−")


def verdict(gain: Mapping[str, Any]) -> str:
    """What an interval allows to say of a gain."""
    if gain["low"] > 0:
        return "raised"
    return "lowered" if gain["high"] < 0 else "did not measurably change"


def headline(found: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    gain, results = found["gains"].get("rl_gain"), found["results"]
    if gain is None:
        return "This run has no result after reinforcement learning to tell of."
    before, after = results["cold_start"]["pass1"], results["rl"]["pass1"]
    said = f"Reinforcement learning {verdict(gain)} the share of right answers"
    length = thought_growth(results)
    grew = ""
    if length and abs(length - 1) >= 0.05:
        grew = (
            f", and its thoughts became {length:.2g} times as long"
            if length > 1
            else (f", and its thoughts shrank to {length:.0%} of their length")
        )
    return f"{said}: {before:.1%} after the cold start, {after:.1%} after RL{grew}."


def protocol(found: Mapping[str, Any], config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """How pass@1 was measured."""
    row = next(iter(found["results"].values()), {})
    problems, k = row.get("problems"), row.get("k")
    if not problems or not k:
        return "The number of problems and of samples is not recorded."
    heat = f" at temperature {config['temperature']}" if "temperature" in config else ""
    heat += f", top-p {config['top_p']}" if "top_p" in config else ""
    seen = metrics.get("seen_in_training")
    left_out = ""
    if seen is not None:
        were = "was" if seen == 1 else "were"
        result = f"{seen} that {were} found there {were} left out" if seen else "none was found there"
        left_out = f" Every problem was looked for in the training sets and in the corpus; {result}."
    return (
        f"{problems:,} held-out problems, k = {k} sample{'s' if k > 1 else ''} each{heat}. Pass@1 is the "
        f"mean over samples and problems; lines across bars are 95% intervals over problems.{left_out}"
    )


def cold_start(data: Mapping[str, Any] | None) -> str:
    """What the cold-start data holds."""
    if not data:
        return "What the cold-start data holds is not recorded."
    meant = {
        "thorough": "thorough ones (every step on a line)",
        "hasty": "hasty ones (two steps at a time)",
        "guess": "bare guesses (an empty thought, then the answer)",
        "other": "others",
    }
    listed = [f"{data['counts'][s]:,} {meant[s]}" for s in data["counts"]]
    joined = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
    return f"The cold-start data holds {data['examples']:,} worked thoughts: {joined}."


def discovered(found: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What RL (of that configuration) had to find by itself, and whether it did."""
    models = found["thinking"]["models"]
    before, after = models.get("cold_start"), models.get("rl")
    said = [_told(config)]
    if not before or not after:
        return said
    said += _slope(before)
    was, now = before["shares"]["thorough"], after["shares"]["thorough"]
    moved = f"Thorough thoughts went from {was:.0%} of the answers to {now:.0%}"
    change = _clear((was, before["responses"]), (now, after["responses"]))
    if change > 0:
        said.append(f"{moved}: it found by itself that writing every step pays.")
    elif change < 0:
        said.append(f"{moved}: it moved away from writing every step.")
    else:
        said.append(f"{moved}: no more than chance would do, so a gain came from elsewhere.")
    return said + _reckoning(before, after)


def _slope(before: Mapping[str, Any]) -> list[str]:
    """How often each way of thinking was right before RL, where each was seen often enough."""
    counts, rights = before["counts"], before["right"]
    if min(counts["thorough"], counts["guess"]) < ENOUGH:
        return []
    hasty = f", when hastily in {rights['hasty']:.0%}" if counts["hasty"] >= ENOUGH else ""
    return [
        f"The slope it could climb: when the cold-start model thought thoroughly it was right in "
        f"{rights['thorough']:.0%} of its answers{hasty}, when it guessed in {rights['guess']:.0%}."
    ]


def _reckoning(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Whether RL also made thorough thoughts right more often."""
    pair = [(p["right"].get("thorough", 0.0), p["counts"]["thorough"]) for p in (before, after)]
    if min(n for _, n in pair) < ENOUGH:
        return []
    said = f"Among thorough thoughts alone, {pair[0][0]:.0%} were right before and {pair[1][0]:.0%} after: "
    change = _clear(*pair)
    if change > 0:
        return [said + "it also learned to reckon better."]
    if change < 0:
        return [said + "each single step became less reliable."]
    return [said + "what it learned is to choose to think, not to reckon better."]


def _clear(before: tuple[float, int], after: tuple[float, int]) -> int:
    """Whether a share (share, count) rose (1), fell (−1), or neither beyond twice the standard error (0).

    One success and one failure are added to each, so that a share of 0 or 1 has an error too. Answers to the
    same problem are not independent, which the factor two does not cover: the table beside the sentence has
    the counts.
    """
    (p, n), (q, m) = (((share * count + 1) / (count + 2), count) for share, count in (before, after))
    error = (p * (1 - p) / (n + 2) + q * (1 - q) / (m + 2)) ** 0.5
    return 0 if abs(q - p) <= 2 * error else (1 if q > p else -1)


def zero(found: Mapping[str, Any]) -> str:
    """What RL did without a cold start."""
    gain, models = found["gains"].get("zero_gain"), found["thinking"]["models"]
    if gain is None:
        return "R1-Zero was not evaluated."
    said = (
        f"Straight from the base model, without a cold start (R1-Zero), RL {verdict(gain)} pass@1: "
        f"{points(gain['gain'])} points [{points(gain['low'])}, {points(gain['high'])}]."
    )
    if "base" in models and "zero" in models:
        was, now = (models[m]["shares"]["thorough"] for m in ("base", "zero"))
        said += f" Its thorough thoughts went from {was:.0%} to {now:.0%}."
    return said


def _told(config: Mapping[str, Any]) -> str:
    """What the reward rewards, by the configuration of the run."""
    parts = [f"{name} (weight {weight:g})" for name, weight in (config.get("rewards") or {}).items() if weight]
    if not parts:
        return "The weights of the reward are not recorded."
    summed = parts[0] if len(parts) == 1 else f"the sum of {', '.join(parts[:-1])} and {parts[-1]}"
    cap = config.get("max_new_tokens")
    cut = f"; a response cut off at {cap} tokens earns nothing" if cap else ""
    return (
        f"The reward of {MODEL_NAMES['rl']} is {summed}: rules on the answer and its form{cut}. "
        f"Nothing in it asks for length, and no way of thinking is preferred."
    )


def lessons(found: Mapping[str, Any]) -> str:
    """What the base model had already read of such problems, where the corpus is counted by kind."""
    for name, table in found["stages"].get("ingest", {}).get("metrics", {}).items():
        of_text = any(unit in name for unit in ("bytes", "characters", "tokens"))
        if isinstance(table, dict) and table.get("lessons") and not of_text:
            total = sum(v for v in table.values() if isinstance(v, int))
            return (
                f"The base model did not start from nothing: {table['lessons']:,} of the {total:,} ingested "
                f"documents are generated lessons with worked problems, which show all these ways."
            )
    return ""
