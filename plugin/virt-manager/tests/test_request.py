"""What is asked of vmgangd."""

import unittest

from vmgang_virt_manager.request import ON_STALL, options
from vmgang_virt_manager.survey import Choice

GANG = Choice("", "web", [], False, [], "")
ALONE = Choice("", "", ["db1"], False, [], "")
ALL = Choice("", "", [], True, [], "")
UNTOUCHED = {"temporary": False, "postcopy": False, "unsafe": False, "bandwidth": 0, "on-stall": "throttle",
             "leave-failed": False}
HOME = {"persistent": ("b", True), "undefinesource": ("b", True)}


class Request(unittest.TestCase):
    def test_what_moves(self):
        self.assertEqual(options(GANG, UNTOUCHED), HOME)
        self.assertEqual(options(ALONE, UNTOUCHED), {**HOME, "domains": ("as", ["db1"])})
        self.assertEqual(options(ALL, UNTOUCHED), {**HOME, "all": ("b", True)})

    def test_how_it_moves(self):
        touched = {"temporary": True, "postcopy": True, "unsafe": True, "bandwidth": 100, "on-stall": "leave",
                   "leave-failed": True}
        self.assertEqual(options(GANG, touched), {
            "postcopy": ("b", True), "unsafe": ("b", True), "bandwidth": ("t", 100), "on-stall": ("s", "leave"),
            "on-failure": ("s", "continue")})

    def test_what_vmgangd_takes_for_granted_is_the_first_choice(self):
        self.assertEqual(ON_STALL[0][0], "throttle")


if __name__ == "__main__":
    unittest.main()
