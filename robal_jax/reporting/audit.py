"""The audit in a report: the verdict of all checks together, and each check with what it means."""

from collections.abc import Mapping, Sequence
from typing import Any

from robal_jax.reporting import page
from robal_jax.reporting.names import BPDA, ENSEMBLES
from robal_jax.reporting.results import (
    CHOICE,
    EVERYTHING,
    FIXED_STEPS,
    FLAGGED,
    NOT_RUN,
    NOTE,
    OWN_GRADIENT,
    PASSED,
    TOO_FEW,
    Results,
    outcome_of,
)


def audit_verdict(audit: Mapping[str, Any] | None, *, ensemble: bool = True) -> tuple[str, str]:
    """Returns the verdict of all checks together.

    Args:
      audit: see :class:`Results`.
      ensemble: whether an ensemble was evaluated.

    Returns:
      An outcome, the first of 'flagged', 'note', 'passed', 'too few images' and 'not run' that any check has;
      and a sentence for people.
    """
    if audit is None:
        return NOT_RUN, "No audit was made, so nothing shows whether the attacks are as strong as they can be"
    verdicts = audit["verdicts"]
    outcomes = [outcome_of(verdict) for verdict in verdicts]
    if _only_read_again(audit):
        same = "rounding decides for some of them" if NOTE in outcomes else "they give the same accuracy"
        return NOT_RUN, (
            f"No audit was made. The stored adversarial images were read again, and {same}; nothing shows "
            "whether the attacks are as strong as they can be"
        )
    count, done = len(verdicts), len(verdicts) - outcomes.count(NOT_RUN)
    overall = next((name for name in (FLAGGED, NOTE, PASSED, TOO_FEW) if name in outcomes), NOT_RUN)
    if overall == NOT_RUN:
        return NOT_RUN, f"No check was run (0 of {count})"
    undecided = outcomes.count(TOO_FEW)
    others = [f"{done} of {count} run"] + [f"{undecided} with too few images to tell"] * bool(undecided)
    remark = f" ({', '.join(others)})"
    if overall in (PASSED, TOO_FEW):
        return overall, f"No check was flagged{remark}"
    if overall == NOTE:
        return NOTE, f"No check was flagged{remark}. {_noted(verdicts, ensemble=ensemble)}"
    flagged = [verdict for verdict in verdicts if outcome_of(verdict) == FLAGGED]
    left_out = [f"{count - done} not run"] * (done < count) + others[1:]
    remark = f" ({', '.join(left_out)})" if left_out else ""
    doubts = {verdict.get("doubts", EVERYTHING) for verdict in flagged}
    lines = []
    if EVERYTHING in doubts:
        lines.append("do not trust any robust accuracy in this report")
    elif OWN_GRADIENT in doubts:
        lines.append("do not trust attacks with the model's own gradient; use the accuracy with BPDA")
    elif FIXED_STEPS in doubts:
        lines.append(
            "do not trust the fixed-step attacks on the cross-entropy (FGSM, PGD, MIM); "
            + ("use the ensemble's accuracy" if ensemble else "evaluate with AutoAttack")
        )
    if CHOICE in doubts:
        lines.append("the checkpoint was selected on test images, so that every accuracy is optimistic")
    return FLAGGED, (
        f"{len(flagged)} of {count} checks {'is' if len(flagged) == 1 else 'are'} flagged{remark}: "
        + "; ".join(lines)
    )


def verdict_on(results: Results) -> tuple[str, str]:
    """Returns :func:`audit_verdict` of an evaluation."""
    attack = results.headline_attack
    ensemble = attack in ENSEMBLES and attack != "pgd_20" + BPDA
    return audit_verdict(results.audit, ensemble=ensemble)


def _only_read_again(audit: Mapping[str, Any]) -> bool:
    """Returns whether no check had images, and none that needs no images of its own is flagged."""
    return audit.get("examples") == 0 and FLAGGED not in map(outcome_of, audit["verdicts"])


def _noted(verdicts: Sequence[Mapping[str, Any]], *, ensemble: bool) -> str:
    """Says which attacks the notes call optimistic, and which accuracy to use."""
    titles: dict[str, list[str]] = {}
    for verdict in verdicts:
        if outcome_of(verdict) == NOTE:
            titles.setdefault(verdict.get("doubts", FIXED_STEPS), []).append(verdict["title"])
    advice = "the ensemble's accuracy is the one to use" if ensemble else "evaluate with AutoAttack"
    says = {
        FIXED_STEPS: f"The fixed-step attacks are optimistic (%s): {advice}",
        OWN_GRADIENT: "Attacks with the model's own gradient are optimistic (%s): use the accuracy with BPDA",
        EVERYTHING: "Rounding decides for some adversarial images (%s), and the ensemble's accuracy is "
        "uncertain by these",
    }
    return ". ".join(says[part] % ", ".join(titles[part]) for part in says if part in titles)


def audit_summary(audit: Mapping[str, Any] | None) -> str:
    """Returns the audit in a cell of a table: the titles of flagged checks, how many were noted and run.

    Example:
      >>> verdicts = [{"title": "No bound", "outcome": "flagged"}, {"title": "Scale", "outcome": "note"}]
      >>> print(audit_summary({"verdicts": verdicts}), "/", audit_summary({"verdicts": verdicts[1:]}))
      flagged: No bound / not flagged (1 of 1 checks run; noted: Scale)
    """
    if audit is None:
        return "no audit"
    titles: dict[str, list[str]] = {}
    for verdict in audit["verdicts"]:
        titles.setdefault(outcome_of(verdict), []).append(verdict["title"])
    if FLAGGED in titles:
        return f"flagged: {', '.join(titles[FLAGGED])}"
    if _only_read_again(audit):
        return "no audit"
    count = len(audit["verdicts"])
    parts = [f"{count - len(titles.get(NOT_RUN, []))} of {count} checks run"]
    if NOTE in titles:
        parts.append(f"noted: {', '.join(titles[NOTE])}")
    if TOO_FEW in titles:
        parts.append(f"too few images for {len(titles[TOO_FEW])}")
    return f"not flagged ({'; '.join(parts)})"


def audit_section(results: Results, pictures: Mapping[str, page.Block]) -> list[page.Block]:
    """Returns the verdict of every check, with its evidence."""
    audit = results.audit
    if audit is None:
        return []
    items = (
        (outcome_of(verdict), verdict["title"], verdict["statement"], verdict["evidence"])
        for verdict in audit["verdicts"]
    )
    count = audit["examples"]
    sample = (
        f" Checks that run attacks of their own use a sample of {count} test images; only those that "
        "are right when clean count."
    )
    return [
        page.section("Audit"),
        page.paragraph(
            "Each check looks for a sign that an attack is weaker than it seems, so that the accuracy after "
            "it is too high. The accuracy after an attack is the share of images still classified correctly."
            + (sample if count else "")
        ),
        page.checks(items),
        *([pictures["curves"]] if "curves" in pictures else []),
    ]


def meaning_section(results: Results) -> list[page.Block]:
    """Returns what each check of the audit means and what to do; nothing for results of older versions."""
    verdicts = [verdict for verdict in (results.audit or {}).get("verdicts", []) if "meaning" in verdict]
    if not verdicts:
        return []
    items = [
        (f"{verdict['title']}.", " ".join(verdict["meaning"][key] for key in ("raised", "means", "do")))
        for verdict in verdicts
    ]
    return [page.section("What the checks mean"), page.points(items)]
