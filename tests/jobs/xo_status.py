"""How Xen Orchestra reads a run's log: the status that its user sees.

From packages/xo-server/src/xo-mixins/backups-ng-logs.mjs and _handleBackupLog.mjs: nothing of
ours, so that what we say and what is understood can be compared.
"""

from __future__ import annotations

from typing import Any

SKIPPED = {"no disks found", "no VMs match this pattern", "unhealthy VDI chain"}

Node = dict[str, Any]


def rendered(log: list[dict[str, Any]]) -> Node:
    """The tree as XO shows it: ``properties``, ``status``, ``children``."""
    nodes: dict[str, Node] = {}
    root: Node | None = None
    for record in log:
        if record["type"] == "start":
            node = {
                "properties": dict(record["properties"]),
                "status": "pending",
                "children": [],
                "retried": False,
            }
            nodes[record["id"]] = node
            if "parentId" in record:
                nodes[record["parentId"]]["children"].append(node)
            else:
                root = node
        elif record["type"] == "warning":
            nodes[record["id"]]["retried"] |= record.get("data", {}).get("isRetry") is True
        elif record["type"] == "end":
            node = nodes[record["id"]]
            node["status"] = _status(node, record)
    assert root is not None
    return root


def _status(node: Node, end: dict[str, Any]) -> str:
    status = str(end["status"])
    if status == "failure" and (end.get("result") or {}).get("message") in SKIPPED:
        status = "skipped"
    if status == "failure":
        return status
    children: list[Node] = node["children"]
    failed = [child for child in children if child["status"] == "failure"]
    if any(not (node["retried"] and _made_good(child, children)) for child in failed):
        return "failure"
    if any(child["status"] == "skipped" for child in children):
        return "skipped"
    return status


def _made_good(failed: Node, siblings: list[Node]) -> bool:
    """Whether a retry succeeded: a sibling with the same name and id."""
    key = (failed["properties"].get("name"), failed["properties"].get("id"))
    return any(
        (one["properties"].get("name"), one["properties"].get("id")) == key
        and one["status"] == "success"
        for one in siblings
    )
