"""The import hook: it extends what it waits for, only there, and its errors stay inside."""

import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOM = pathlib.Path(__file__).parent.parent

# A virt-manager that is only its imports; its menu says whether it was extended.
STAND_IN = {
    "virtManager/__init__.py": "",
    "virtManager/vmmenu.py": "print('the menu')",
    "virtinst/__init__.py": "class log:\n    exception = print",
    "gi/__init__.py": "",
    "gi/repository/__init__.py": "Gtk = None",
}
PROGRAM = "import sys\nsys.path.insert(0, %r)\nimport virtManager.vmmenu\nprint('goes on')\n"


class Entry(unittest.TestCase):
    def run_program(self, name, menu):
        """What a program of this name prints, with a Python that finds vmgang's .pth and this virtManager."""
        with tempfile.TemporaryDirectory() as scratch:
            scratch = pathlib.Path(scratch)
            for path, text in {**STAND_IN, "virtManager/vmmenu.py": menu}.items():
                file = scratch / "share" / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            program = scratch / name
            program.write_text(PROGRAM % str(scratch / "share"))
            # What the Python of the system does with its own directory at the start.
            start = "import site, sys, runpy; sys.dont_write_bytecode = True; " \
                "sys.orig_argv = ['python3', '-s', sys.argv[1]]; sys.path.insert(0, %r); " \
                "site.addsitedir(%r); runpy.run_path(sys.argv[1], run_name='__main__')" % (str(ROOM), str(ROOM))
            ran = subprocess.run([sys.executable, "-c", start, str(program)], capture_output=True, text=True,
                                 check=True)
            return ran.stdout + ran.stderr

    def test_the_menu_of_virt_manager_is_extended(self):
        menu = "class VMActionMenu:\n    def _init_state(self): pass\n    def update_widget_states(self, vm): pass\n" \
            "import atexit\natexit.register(lambda: print('wrapped', hasattr(VMActionMenu._init_state, '__wrapped__')))"
        said = self.run_program("virt-manager", menu)
        self.assertIn("wrapped True", said)
        self.assertNotIn("vmgang:", said)

    def test_a_menu_that_is_not_known_is_left_alone(self):
        said = self.run_program("virt-manager", "")
        self.assertIn("goes on", said)
        self.assertIn("vmgang: no", said)

    def test_other_programs_are_left_alone(self):
        said = self.run_program("virt-manager-like", "")
        self.assertEqual(said, "goes on\n")


if __name__ == "__main__":
    unittest.main()
