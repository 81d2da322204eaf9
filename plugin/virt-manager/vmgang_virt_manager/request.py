"""What the user has asked for, as the arguments of `Migrate`.

Owns what the dialog's choices are called there. Pure.
"""

# What is done about a VM that dirties its memory as fast as it can be sent: the value, and for the user.
ON_STALL = (
    ("throttle", "Slow it down"),
    ("postcopy", "Let it go on at the destination (post-copy)"),
    ("leave", "Leave it here, move the others"),
    ("abort", "Abort"),
)


def options(choice, settings):
    """The dictionary of `Migrate`, each value with its D-Bus type. What vmgangd takes for granted is left out."""
    asked = {}
    if choice.all:
        asked["all"] = ("b", True)
    elif not choice.gang:
        asked["domains"] = ("as", choice.domains)
    # As virt-manager's own dialog has it: the destination is the VM's new home, unless the move is temporary.
    if not settings["temporary"]:
        asked["persistent"] = asked["undefinesource"] = ("b", True)
    for flag in ("postcopy", "unsafe"):
        if settings[flag]:
            asked[flag] = ("b", True)
    if settings["bandwidth"]:
        asked["bandwidth"] = ("t", settings["bandwidth"])
    if settings["on-stall"] != "throttle":
        asked["on-stall"] = ("s", settings["on-stall"])
    if settings["leave-failed"]:
        asked["on-failure"] = ("s", "continue")
    return asked
