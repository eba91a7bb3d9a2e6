"""Results as they were written before probes said their own columns, brought to today's form (imports no torch)."""

from __future__ import annotations

from typing import Any

from eval.scores import HEADLINE_K, wilson


def as_today(results: dict[str, Any]) -> dict[str, Any]:
    """The same with `columns`, `notes`, `warnings` and intervals; what has columns already is given back as it is.

    KeyError or TypeError for what no version wrote.
    """
    if "columns" in results:
        return results
    rows = results["rows"]
    pretrained, num_val = rows["pretrained"], results["data"]["val"]["num_labelled"]
    by_feature, headline = pretrained["knn"], pretrained["headline"]
    columns = [
        {
            "probe": "knn",
            "name": f"knn_{name}",
            "title": f"k-NN {name}{'*' if name == headline and len(by_feature) > 1 else ''}",
            "paths": [[name, str(HEADLINE_K)], ["pixels", str(HEADLINE_K)]],
            "headline": name == headline,
        }
        for name in by_feature
    ]
    columns += [
        {"probe": name, "name": name, "title": name, "paths": [[]], "headline": True}
        for name in ("linear", "logistic")
        if name in pretrained
    ]
    return {
        **results,
        "rows": _with_intervals(rows, num_val),
        "columns": columns,
        "notes": _notes(pretrained, results["protocol"]),
        "warnings": [],
    }


def _with_intervals(node: Any, num_val: int) -> Any:
    if isinstance(node, list):
        return [_with_intervals(each, num_val) for each in node]
    if not isinstance(node, dict):
        return node
    known = {name: _with_intervals(each, num_val) for name, each in node.items()}
    if "standard_error" in known and "interval" not in known:
        known["interval"] = list(wilson(known["top1"], num_val))
    return known


def _notes(scores: dict[str, Any], protocol: dict[str, Any]) -> list[str]:
    linear, chosen, recipe = scores["linear"], scores["linear"]["chosen"], protocol["linear"]
    spread, starred = linear["std_over_seeds"], len(scores["knn"]) > 1
    notes = [
        f"k-NN: k = {HEADLINE_K}, T = {protocol['temperature']:g}"
        + (f"; the headline (*) is {scores['headline']}" if starred else ""),
        f"linear: on {chosen['input']}{', standardised' if chosen['standardised'] else ''}, "
        f"lr {chosen['learning_rate']:g} x batch / 256, chosen on {100 * recipe['held_out']:g} % held out of train "
        f"({100 * chosen['held_out']:.1f} there); {recipe['epochs']} epochs on {protocol['features']}; "
        + (f"std over {len(linear['top1_of_seed'])} seeds {100 * spread:.2f}" if spread is not None else "one seed"),
    ]
    if linear["at_grid_edge"]:
        notes.append("warning: the linear probe's rate lies at the edge of its grid, which was not widened")
    if (logistic := scores.get("logistic")) is not None:
        notes.append(f"logistic: on {logistic['input']}, C {logistic['chosen']:.2g} of {len(logistic['grid'])}")
        if logistic["at_grid_edge"]:
            notes.append("warning: the logistic probe's C lies at the edge of its grid")
    return notes
