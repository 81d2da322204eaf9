"""What is offered, and which job belongs to it."""

import unittest

from vmgang_virt_manager.survey import Gang, Job, Member, choices, job_of, movable

WEB1, WEB2 = Member("web1", "u1", "running", 1), Member("web2", "u2", "shut off", 1)
DB1 = Member("db1", "u3", "paused", 1)
GANGS = [Gang("web", [WEB1, WEB2], ""), Gang("bad", [], "its metadata cannot be read")]


class Survey(unittest.TestCase):
    def test_the_gang_of_a_vm_comes_first(self):
        offered = choices(GANGS, WEB1, [WEB1, DB1])
        self.assertEqual([choice.label for choice in offered], [
            "Gang 'web' (1 VM)", "Only 'web1'", "Gang 'bad' (0 VMs)", "All running VMs of this host (2 VMs)"])
        self.assertEqual(offered[0].gang, "web")
        self.assertEqual(offered[1].hint, "")

    def test_a_vm_without_a_gang_is_told_how_to_make_one(self):
        offered = choices(GANGS, DB1, [WEB1, DB1])
        self.assertEqual(offered[0].domains, ["db1"])
        self.assertIn("vmgang gang add", offered[0].hint)

    def test_a_host_has_its_gangs_and_everything(self):
        offered = choices(GANGS, None, [WEB1, DB1])
        self.assertEqual([(choice.gang, choice.all) for choice in offered],
                         [("bad", False), ("web", False), ("", True)])
        self.assertEqual(offered[0].hint, "its metadata cannot be read")

    def test_what_is_shut_off_stays(self):
        self.assertEqual([movable(choice) for choice in choices(GANGS, None, [WEB1, DB1])], [0, 1, 2])

    def test_jobs_are_found_by_gang_and_by_member(self):
        gang, alone, _bad, everything = choices(GANGS, WEB1, [WEB1, DB1])
        of_gang, of_db = Job("/1", "web", "b", []), Job("/2", "", "b", ["db1"])
        self.assertEqual(job_of(gang, [of_db, of_gang]), of_gang)
        self.assertEqual(job_of(everything, [of_db]), of_db)
        self.assertIsNone(job_of(alone, [of_db]))


if __name__ == "__main__":
    unittest.main()
