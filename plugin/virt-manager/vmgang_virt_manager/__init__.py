"""How vmgang gets into virt-manager: its menus are extended once virt-manager has imported them.

`vmgang_virt_manager.pth` beside this package calls `watch` in the Python that runs virt-manager, and in no
other. Owns the import hook. Must not: import anything of virt-manager or GTK, let an error of vmgang's out
into virt-manager, or change a file of it.
"""

import importlib.machinery
import sys


def watch():
    """Waits for virt-manager's menus to be imported."""
    sys.meta_path.insert(0, _Watcher())


def guarded(work, *arguments):
    """Runs a part of vmgang's; virt-manager goes on without it if it breaks, and its log says why."""
    try:
        return work(*arguments)
    except Exception:  # pylint: disable=broad-except
        from virtinst import log
        log.exception("vmgang: no \"Migrate gang...\"; virt-manager works without it. To be rid of this "
                      "message remove vmgang_virt_manager.pth, or report it to the vmgang project")
        return None


def _extend(module):
    from . import menu
    menu.EXTENSIONS[module.__name__](module)


class _Watcher:
    """Finds the modules that are waited for as Python would, and has them extended after they have run."""

    WANTED = ("virtManager.vmmenu", "virtManager.manager")

    def find_spec(self, name, path=None, _target=None):
        if name not in self.WANTED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_extend(module):
                run(module)
                guarded(_extend, module)

            spec.loader.exec_module = run_and_extend
        return spec
