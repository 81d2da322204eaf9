"""A job as vmgangd describes it, as rows and sentences.

Pure: the properties of `org.vmgang.Job1` in, what the progress window shows out.
"""

import json
from collections import namedtuple

from .findings import saved, sent
from .text import duration, size, vms

# percent is None while nobody knows it.
Row = namedtuple("Row", "name state percent sent remark")

STATES = {
    "waiting": "Waiting",
    "ballooning": "Giving memory back",
    "copying": "Copying",
    "held": "Ready, held",
    "switching": "Switching over",
    "migrated": "Migrated",
    "source": "On this host",
    "failed": "Unknown",
}
PHASES = {
    "preparing": "Preparing",
    "running": "Copying, and holding those that are ready",
    "switching": "Switching over",
}
TITLES = {
    "completed": "Migrated",
    "partial": "Only partly migrated",
    "failed": "Not migrated",
    "aborted": "Migration aborted",
}


def name(properties):
    """What moves: "gang 'web'", or the only VM, or how many there are."""
    progress = properties["Progress"]
    members = progress.get("members", [])
    if progress.get("gang"):
        return "gang '%s'" % progress["gang"]
    return "'%s'" % members[0]["name"] if len(members) == 1 else vms(len(members))


def rows(properties):
    """A row for each member."""
    return [_row(member) for member in properties["Progress"].get("members", [])]


def percent(rows_of_all):
    """How far the gang is; None while nobody knows."""
    known = [row.percent for row in rows_of_all if row.percent is not None]
    return sum(known) // len(rows_of_all) if known else None


def amounts(properties):
    """What was sent so far, and what has saved how much."""
    statistics = properties["Statistics"]
    stream = statistics.get("qemu_stream", 0)
    texts = [sent(statistics.get("wire", 0), stream)]
    if stream:
        texts.append(saved(statistics.get("saved", {})))
    return "\n".join(texts)


def elapsed(properties):
    return duration(properties["Progress"].get("elapsed_ms", 0))


def elapsed_of(report):
    return duration(report["elapsed_ms"])


def result(properties):
    """The report of the ended job, or None."""
    text = properties["Result"]
    return json.loads(text) if text else None


def result_rows(report):
    return [Row(domain["name"], STATES.get(domain["state"], domain["state"]),
                100 if domain["state"] == "migrated" else 0,
                size(domain["wire_bytes"]), _ended(domain)) for domain in report["domains"]]


def conclusion(report, statistics):
    """How it ended, a few sentences."""
    there = sum(domain["state"] == "migrated" for domain in report["domains"])
    text = {
        "completed": "%s to %s" % (_all("moved", there), report["destination"]),
        "partial": "%s of %s moved to %s" % (there, vms(len(report["domains"])), report["destination"]),
    }.get(report["state"], "Every VM is on this host as before")
    if any(domain["state"] == "failed" for domain in report["domains"]):
        text = "Of some VMs it is not known where they run; start them nowhere before you have looked"
    sentences = [text + "."]
    pauses = [domain["downtime_ms"] for domain in report["domains"] if domain["downtime_ms"] is not None]
    if there and pauses:
        sentences.append("The longest pause was %s." % duration(max(pauses)))
    if report["switchover_spread_ms"] is not None:
        sentences.append("They switched over within %s." % duration(report["switchover_spread_ms"]))
    if statistics.get("barrier") == "approximate":
        sentences.append("Not every VM could be held until all were ready.")
    return " ".join(sentences)


def trouble(report):
    """What the error dialog says: a summary and details, or None if there is nothing to say."""
    if report["state"] not in ("failed", "partial"):
        return None
    summary = report["error"] or TITLES[report["state"]]
    details = ["%s: %s" % (domain["name"], domain["error"] or STATES.get(domain["state"], ""))
               for domain in report["domains"]]
    return summary, "\n".join([summary, ""] + details + ["", "Job %s" % report["job"]])


def _row(member):
    state = member["state"]
    return Row(member["name"], STATES.get(state, state), _percent(member), size(member["qemu_stream_bytes"]),
               _remark(member))


def _percent(member):
    """As the command `vmgang` counts it: the last hundredth is the switchover."""
    state, total = member["state"], member["total_bytes"]
    if state in ("waiting", "ballooning"):
        return 0
    if state == "migrated":
        return 100
    if state == "switching":
        return 99
    return (total - min(member["remaining_bytes"], total)) * 99 // total if total else None


def _remark(member):
    if member.get("dirtied_per_s"):
        return "Dirties %s/s, %s/s can be sent" % (size(member["dirtied_per_s"]),
                                                  size(member.get("carried_per_s", 0)))
    return "Slowed down" if member.get("throttled") else ""


def _ended(domain):
    if domain["error"]:
        return domain["error"]
    return "Paused for %s" % duration(domain["downtime_ms"]) if domain["downtime_ms"] is not None else ""


def _all(done, number):
    return "The VM has %s" % done if number == 1 else "All %s have %s" % (vms(number), done)
