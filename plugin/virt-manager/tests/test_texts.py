"""What vmgangd says, in the words of the windows."""

import unittest

from vmgang_virt_manager import findings, job
from vmgang_virt_manager.text import duration, size


def finding(level, subject, fix="mend it"):
    return {"check": "x", "level": level, "subject": subject, "what": "it is so", "fix": fix}


class Findings(unittest.TestCase):
    FOUND = [finding("advice", "web1, web2"), finding("warning", "web2"), finding("refused", "web2"),
             finding("warning", "b"),
             finding("ok", "web3", None)]

    def test_members_have_their_own_and_the_worst_counts(self):
        about = findings.of_members(self.FOUND, ["web1", "web2", "web3"])
        self.assertEqual({name: remark.level for name, remark in about.items()},
                         {"web1": "advice", "web2": "refused"})
        self.assertEqual(about["web2"].text.count("mend it"), 3)

    def test_the_rest_is_about_the_hosts(self):
        rest = findings.of_hosts(self.FOUND, ["web1", "web2", "web3"])
        self.assertEqual(rest.level, "warning")
        self.assertNotIn("web", rest.text)
        self.assertIsNone(findings.of_hosts(self.FOUND[:3], ["web1", "web2"]))

    def test_an_estimate_names_what_saves_most_first(self):
        text = findings.estimated({"migration": {"qemu_stream": 1000, "wire": 250, "saved": {
            "zero": 100, "cross_vm": 700, "compression": -50}}})
        self.assertEqual(text, "About 250 B would be sent instead of 1000 B (25%).\n"
                               "Saved: 700 B shared by VMs, 100 B zeros")


class Jobs(unittest.TestCase):
    def member(self, **more):
        return {"name": "web1", "state": "copying", "total_bytes": 1000, "remaining_bytes": 500,
                "qemu_stream_bytes": 2048, **more}

    def rows(self, *members):
        return job.rows({"Progress": {"members": list(members)}})

    def test_rows_say_how_far_and_what_is_wrong(self):
        row = self.rows(self.member(dirtied_per_s=3 << 20, carried_per_s=1 << 20))[0]
        self.assertEqual((row.state, row.percent, row.sent), ("Copying", 49, "2.00 KiB"))
        self.assertEqual(row.remark, "Dirties 3.00 MiB/s, 1.00 MiB/s can be sent")
        self.assertEqual(self.rows(self.member(throttled=True))[0].remark, "Slowed down")

    def test_nobody_knows_at_first(self):
        rows = self.rows(self.member(total_bytes=0))
        self.assertIsNone(rows[0].percent)
        self.assertIsNone(job.percent(rows))
        self.assertEqual(job.percent(self.rows(self.member(), self.member(state="migrated"))), 74)

    def report(self, state, *domains):
        return {"job": "1", "state": state, "destination": "b", "error": "web2 broke", "elapsed_ms": 1,
                "switchover_spread_ms": 12,
                "domains": [{"name": name, "state": of, "downtime_ms": pause, "wire_bytes": 1, "error": None}
                            for name, of, pause in domains]}

    def test_the_end_says_where_everybody_is(self):
        moved = ("web1", "migrated", 26)
        self.assertEqual(
            job.conclusion(self.report("completed", moved, moved), {"barrier": "approximate"}),
            "All 2 VMs have moved to b. The longest pause was 26 ms. They switched over within 12 ms. "
            "Not every VM could be held until all were ready.")
        self.assertIn("1 of 2 VMs moved", job.conclusion(self.report("partial", moved, ("web2", "source", None)), {}))
        self.assertIn("on this host as before", job.conclusion(self.report("failed", ("web1", "source", None)), {}))
        self.assertIn("not known where", job.conclusion(self.report("failed", ("web1", "failed", None)), {}))

    def test_only_trouble_makes_an_error(self):
        self.assertIsNone(job.trouble(self.report("completed", ("web1", "migrated", 1))))
        self.assertIsNone(job.trouble(self.report("aborted", ("web1", "source", None))))
        self.assertEqual(job.trouble(self.report("failed", ("web1", "source", None)))[0], "web2 broke")


class Numbers(unittest.TestCase):
    def test_as_the_command_writes_them(self):
        self.assertEqual([size(number) for number in (999, 1536, 1 << 30)], ["999 B", "1.50 KiB", "1.00 GiB"])
        self.assertEqual([duration(ms) for ms in (999, 1234, 125000)], ["999 ms", "1.2 s", "2 min 05 s"])


if __name__ == "__main__":
    unittest.main()
