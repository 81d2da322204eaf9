"""What the test does in virt-manager, a step each: walk.py STEP. Fails where the screen is not as it should be.

What has become of the VMs is for the test to find out.
"""

import sys

from desktop import (Manager, button, expect, part, picture, press, rows, text_with, wait_for)

ENTRY = "Migrate gang..."
DIALOG = "Migrate a gang"
LOCAL, REMOTE = "QEMU/KVM", "QEMU/KVM: b"


def open_dialog(manager, row):
    press(manager.menu_item(row, ENTRY))
    return manager.window(DIALOG)


def menus(manager):
    """The entry is there, and can be used where vmgangd can be asked."""
    expect(manager.menu_item("web1", ENTRY).sensitive, "the entry of a VM")
    picture("menu")
    manager.leave_menu()
    expect(manager.menu_item(LOCAL, ENTRY).sensitive, "the entry of the local connection")
    manager.leave_menu()
    entry = manager.menu_item(REMOTE, ENTRY)
    expect(not entry.sensitive, "the entry of a remote connection is off")
    expect("Start virt-manager on b" in entry.description, entry.description)
    manager.leave_menu()


def look(manager):
    """The gang, its members, what it would send, and what the doctor says."""
    dialog = open_dialog(manager, "web1")
    text_with(dialog, "Migrate gang 'web'")
    wait_for("the members", lambda: [row[0] for row in rows(dialog)] == ["web1", "web2", "web3"])
    # What virt-manager knows as another host is offered.
    expect(part(dialog, ["text"], "destination").text == "qemu+tls://b/system", "the destination")
    press(button(dialog, "Check hosts"))
    text_with(dialog, "A migration would be possible")
    press(button(dialog, "Estimate"))
    text_with(dialog, "would be sent instead of")
    press(part(dialog, ["toggle button"], "Advanced options"))
    part(dialog, ["check box"], "Temporary move")
    picture("dialog")
    press(button(dialog, "Cancel"))
    manager.is_gone(DIALOG)


def abort(manager):
    """A job goes on when its window is closed, is shown again, and is aborted."""
    dialog = open_dialog(manager, "web2")
    text_with(dialog, "Migrate gang 'web'")
    press(button(dialog, "Migrate"))
    progress = manager.window("Migrating gang 'web'")
    wait_for("a member that copies", lambda: "Copying" in [row[1] for row in rows(progress)])
    text_with(progress, "instead of")
    picture("progress")
    press(button(progress, "Close"))
    manager.is_gone("Migrating gang")
    press(manager.menu_item("web3", ENTRY))
    progress = manager.window("Migrating gang 'web'")
    press(button(progress, "Abort"))
    ended = manager.window("Migration aborted: gang 'web'")
    text_with(ended, "Every VM is on this host as before")
    press(button(ended, "Close"))


def migrate(manager):
    dialog = open_dialog(manager, "web1")
    text_with(dialog, "Migrate gang 'web'")
    press(button(dialog, "Migrate"))
    ended = manager.window("Migrated: gang 'web'")
    text_with(ended, "All 3 VMs have moved to qemu+tls://b/system")
    expect([row[:2] for row in rows(ended)] == [[name, "Migrated"] for name in ("web1", "web2", "web3")], rows(ended))
    picture("result")
    press(button(ended, "Close"))


def refuse(manager):
    """A destination that does not exist, in virt-manager's own dialog for errors."""
    dialog = open_dialog(manager, "db1")
    text_with(dialog, "'db1' is in no gang")
    expect(not button(dialog, "Estimate").sensitive, "an estimate of no gang")
    part(dialog, ["text"], "destination").text = "qemu+tls://nowhere/system"
    press(button(dialog, "Migrate"))
    expect("Unable to migrate" in manager.error("nowhere"), "the error")
    picture("error")
    manager.close_error()
    press(button(dialog, "Cancel"))


def forbidden(manager):
    """Somebody who may use libvirt, and not vmgang."""
    dialog = open_dialog(manager, "db1")
    text_with(dialog, "'db1' is in no gang")
    press(button(dialog, "Migrate"))
    expect("org.vmgang.migrate" in manager.error("org.vmgang.migrate"), "the error")
    manager.close_error()


def everything(manager):
    """From the menu of the host."""
    dialog = open_dialog(manager, LOCAL)
    text_with(dialog, "Migrate all VMs")
    press(button(dialog, "Migrate"))
    manager.window("Migrated: 'db1'")


def broken(manager):
    """vmgang does not work in this virt-manager; everything else does."""
    press(manager.menu_item("db1", "Migrate..."))
    manager.window("Migrate the virtual machine")
    expect(not manager.menu_items("db1", ENTRY), "no entry")


STEPS = (menus, look, abort, migrate, refuse, forbidden, everything, broken)

if __name__ == "__main__":
    try:
        {step.__name__: step for step in STEPS}[sys.argv[1]](Manager())
    except Exception:
        picture("failure", whole=True)
        raise
