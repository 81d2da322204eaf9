"""virt-manager as somebody at the screen uses it: menus, buttons, texts, by way of accessibility; and
pictures of it.

Owns how things are found. Must not: know what vmgang is.
"""

import os
import subprocess
import sys
import time

import gi
from dogtail.config import config

# The session has no GNOME to ask, and virt-manager turns accessibility on by itself.
config.checkForA11y = False
config.logDebugToStdOut = config.logDebugToFile = False

from dogtail import tree  # noqa: E402

# dogtail has put one of its own there, which is silent.
sys.excepthook = sys.__excepthook__

gi.require_version("Gdk", "3.0")
gi.require_version("GdkX11", "3.0")
from gi.repository import Gdk, GdkX11, GLib  # noqa: E402,F401

PATIENCE_SECONDS = 200
# The name of the role has changed with at-spi2-core 2.5x.
BUTTON = ("button", "push button")


def expect(good, what):
    if not good:
        raise AssertionError(what)


def wait_for(what, found):
    """Waits until `found` returns something true, and returns that."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            result = found()
        except (tree.SearchError, GLib.Error, AttributeError):
            # Widgets come and go while they are looked at.
            result = None
        if result:
            return result
        if time.monotonic() > end:
            raise AssertionError("waited in vain for %s" % what)
        time.sleep(0.1)


def find(root, condition):
    """The first one on the screen, or None."""
    return next(iter(find_all(root, condition)), None)


def find_all(root, condition):
    return root.findChildren(lambda node: condition(node) and node.showing)


class Manager:
    """The running virt-manager."""

    def __init__(self):
        self.app = wait_for("virt-manager", lambda: tree.root.application("virt-manager", retry=False))

    def window(self, title):
        return wait_for("a window '%s'" % title, lambda: self._window(title))

    def is_gone(self, title):
        wait_for("the end of '%s'" % title, lambda: not self._window(title))

    def menu_item(self, row, name):
        """Opens the menu of a row, and finds an entry."""
        self._open_menu(row)
        return self._entries(name)[0]

    def menu_items(self, row, name):
        """The same of one that need not be there."""
        self._open_menu(row)
        return self._entries(name)

    def leave_menu(self):
        def left():
            subprocess.run(["xdotool", "key", "Escape"], check=True)
            return not self._menu_items()
        wait_for("the end of the menu", left)

    def error(self, words):
        """The text of virt-manager's dialog for errors, which has these words."""
        dialog = wait_for("an error", self._error)
        return text_with(dialog, words)

    def close_error(self):
        press(button(self._error(), "Close"))
        wait_for("the end of the error", lambda: not self._error())

    def _window(self, title):
        return next((window for window in self.app.children if window.roleName in ("frame", "dialog")
                     and title in window.name and window.showing), None)

    def _error(self):
        return find(self.app, lambda node: node.roleName == "alert")

    def _row(self, name):
        def is_row(node):
            return node.roleName == "table cell" and node.name.split("\n")[0].split(" - ")[0] == name
        return wait_for("a row '%s'" % name, lambda: find(self.window("Virtual Machine Manager"), is_row))

    def _open_menu(self, row):
        # With the mouse: accessibility has no word for a menu of a row. A click is lost while another menu or window
        # is still closing.
        def opened():
            node = self._row(row)
            (left, top), (width, height) = node.position, node.size
            place = [str(left + width // 2), str(top + height // 2)]
            subprocess.run(["xdotool", "mousemove", *place, "click", "3"], check=True)
            end = time.monotonic() + 3
            while not self._menu_items() and time.monotonic() < end:
                time.sleep(0.1)
            return self._menu_items()
        wait_for("a menu of '%s'" % row, opened)

    def _menu_items(self):
        return [item for window in self.app.children if window.roleName == "window"
                for item in find_all(window, lambda node: node.roleName == "menu item")]

    def _entries(self, name):
        return [item for item in self._menu_items() if item.name == name]


def press(node):
    node.doActionNamed("activate" if node.roleName == "toggle button" else "click")


def button(window, name):
    return part(window, BUTTON, name)


def part(window, roles, name):
    """A widget of a window, by its role and name."""
    return wait_for("a %s '%s' in '%s'" % (roles[0], name, window.name), lambda: find(
        window, lambda node: node.roleName in roles and node.name == name))


def text_with(window, words):
    """The text of the label that has these words."""
    labels = lambda: find_all(window, lambda node: node.roleName == "label")  # noqa: E731
    return wait_for("a text with '%s' in '%s'" % (words, window.name), lambda: next(
        (label.text for label in labels() if words in (label.text or "")), None))


def rows(window):
    """The texts of the list of members."""
    table = find(window, lambda node: node.name == "members")
    columns = table.queryTable().nColumns
    # A cell with an icon in it has the text in a cell of its own.
    texts = ["".join([cell.name] + [inner.name for inner in cell.children])
             for cell in table.children if cell.roleName == "table cell"]
    return [texts[at:at + columns] for at in range(0, len(texts), columns)]


def picture(name, whole=False):
    """Keeps a picture of the active window with its frame, or of the whole screen."""
    # No tooltip is wanted, and what is still being drawn is waited for.
    subprocess.run(["xdotool", "mousemove", "1279", "1023"], check=True)
    time.sleep(1)
    root = Gdk.get_default_root_window()
    frame = (root if whole else Gdk.Screen.get_default().get_active_window()).get_frame_extents()
    shot = Gdk.pixbuf_get_from_window(root, frame.x, frame.y, frame.width, frame.height)
    shot.savev(os.path.join(os.environ["XDG_RUNTIME_DIR"], name + ".png"), "png", ["compression"], ["9"])
