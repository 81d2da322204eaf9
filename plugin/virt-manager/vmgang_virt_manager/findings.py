"""What vmgangd's doctor and its estimate have said, as the dialog shows it.

Pure: their JSON objects in (docs/operations.md has the fields), texts out.
"""

from collections import namedtuple

from .text import size

# level is the worst of the texts; text has a line each.
Remark = namedtuple("Remark", "level text")

LEVELS = ("ok", "advice", "warning", "refused")
ICONS = {"advice": "dialog-information", "warning": "dialog-warning", "refused": "dialog-error"}

# Kinds of savings, as a user may think of them.
SAVINGS = {
    "zero": "zeros",
    "uniform": "uniform pages",
    "intra_vm": "repeated in one VM",
    "cross_vm": "shared by VMs",
    "staged": "prepared",
    "destination": "there already",
    "sub_page": "similar pages",
    "delta": "differences",
    "compression": "compression",
}


def of_members(findings, names):
    """The remark about each of these VMs that has one."""
    about = {}
    for finding in findings:
        for name in finding["subject"].split(", "):
            if name in names and finding["level"] != "ok":
                about.setdefault(name, []).append(finding)
    return {name: _remark(of_name) for name, of_name in about.items()}


def of_hosts(findings, names):
    """The remark about everything else, or None."""
    other = [finding for finding in findings
             if finding["level"] != "ok" and not set(finding["subject"].split(", ")) & set(names)]
    return _remark(other) if other else None


def estimated(estimate):
    """An estimate in two lines."""
    migration = estimate["migration"]
    return "About %s would be sent%s.\n%s" % (
        size(migration["wire"]),
        _of(migration["wire"], migration["qemu_stream"]),
        saved(migration["saved"]))


def saved(kinds):
    """What has saved how much, the largest first."""
    parts = sorted(((number, kind) for kind, number in kinds.items() if number > 0), reverse=True)
    parts = ["%s %s" % (size(number), SAVINGS.get(kind, kind)) for number, kind in parts]
    return "Saved: %s" % ", ".join(parts) if parts else "Nothing saved"


def sent(wire, stream):
    """What has been sent of what the VMs' QEMUs have written."""
    # Before the first guest sends, the daemons have only greeted each other.
    return "Sent %s%s" % (size(wire), _of(wire, stream) if stream else "")


def _of(wire, stream):
    percent = " (%d%%)" % (wire * 100 // stream) if stream else ""
    return " instead of %s%s" % (size(stream), percent)


def _remark(findings):
    level = max((finding["level"] for finding in findings), key=LEVELS.index)
    lines = []
    for finding in findings:
        line = "%s: %s" % (finding["subject"], finding["what"])
        if finding["fix"]:
            line += " \N{RIGHTWARDS ARROW} %s" % finding["fix"]
        lines.append(line)
    return Remark(level, "\n".join(lines))
