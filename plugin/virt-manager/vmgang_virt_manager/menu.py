"""The entries "Migrate gang..." in virt-manager's menus of a VM and of a connection.

Owns where they are, and when they can be used. The classes of virt-manager that make these menus get their
methods wrapped; what they did before they still do, first.
"""

import functools

from gi.repository import Gtk

from . import guarded

LABEL = "Migrate gang..."
NAME = "vmgang-migrate"


def extend_vm_menu(module):
    """`virtManager.vmmenu`: the menu of a VM, in the manager and in the VM's own window."""
    menu = module.VMActionMenu
    _after(menu, "_init_state", _add_to_vm_menu)
    _after(menu, "update_widget_states", _update_vm_menu)


def extend_manager(module):
    """`virtManager.manager`: the menu of a connection."""
    manager = module.vmmManager
    _after(manager, "init_context_menus", _add_to_connection_menu)
    _after(manager, "popup_vm_menu", _update_connection_menu)


EXTENSIONS = {
    "virtManager.vmmenu": extend_vm_menu,
    "virtManager.manager": extend_manager,
}


def why_not(conn):
    """Why VMs of this connection cannot be migrated by vmgang from here; empty if they can."""
    if conn.is_remote():
        return ("vmgangd is asked over the system bus of the host where virt-manager runs. "
                "Start virt-manager on %s to migrate its gangs." % conn.get_uri_hostname())
    if not conn.is_qemu_privileged():
        return "vmgang migrates VMs of QEMU/KVM that belong to the system (qemu:///system)."
    if not conn.is_active():
        return "Connect to the host first."
    return ""


def _after(owner, name, work):
    """Has `work` done after a method, with the same arguments."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(self, *arguments, **keywords):
        result = method(self, *arguments, **keywords)
        guarded(functools.partial(work, self, *arguments, **keywords))
        return result

    setattr(owner, name, wrapped)


def _item(activated):
    item = Gtk.MenuItem.new_with_mnemonic(LABEL)
    item.vmm_widget_name = NAME
    item.connect("activate", lambda _item: activated())
    item.show()
    return item


def _allow(item, reason):
    item.set_sensitive(not reason)
    item.set_tooltip_text(reason or None)


def _show_dialog(source, conn, vm):
    try:
        # Only now: it costs some time, and most starts of virt-manager do without.
        from .dialog import GangDialog
        GangDialog.show_instance(source, conn, vm)
    except Exception as error:  # pylint: disable=broad-except
        source.err.show_err("Error launching vmgang's dialog: %s" % error)


# pylint: disable=protected-access
def _add_to_vm_menu(menu):
    def activated():
        vm = menu._current_vm_cb()
        if vm:
            _show_dialog(menu._parent, vm.conn, vm)

    names = [getattr(child, "vmm_widget_name", None) for child in menu.get_children()]
    place = names.index("migrate") + 1 if "migrate" in names else -1
    menu.insert(_item(activated), place)


def _update_vm_menu(menu, vm):
    for child in menu.get_children():
        if getattr(child, "vmm_widget_name", None) == NAME:
            reason = why_not(vm.conn) if vm else "Choose a VM."
            if not reason and not vm.is_stoppable():
                reason = "Only running VMs are migrated."
            _allow(child, reason)


def _add_to_connection_menu(manager):
    item = _item(lambda: _show_dialog(manager, manager.current_conn(), None))
    manager.connmenu.add(Gtk.SeparatorMenuItem(visible=True))
    manager.connmenu.add(item)
    manager.connmenu_items[NAME] = item


def _update_connection_menu(manager, model, row, _event):
    # The same test as virt-manager's own: VMs are below their connection.
    if model.iter_parent(row) is None:
        conn = model[row][0]
        _allow(manager.connmenu_items[NAME], why_not(conn))
