"""The window that shows a job: each member, the gang, and how it ended.

Owns the window of progress.ui, one for each job. Must not: wait for vmgangd, or end the job when it is closed.
"""

import os

from virtinst import log, xmlutil
from virtManager.baseclass import vmmGObjectUI
from virtManager.connmanager import vmmConnectionManager

from . import job
from .daemon import Daemon
from .findings import saved, sent

UI_FILE = os.path.join(os.path.dirname(__file__), "progress.ui")

# vmgangd renews what it says twice a second.
POLL_MILLISECONDS = 500
# It may be restarted, or the system bus busy.
FAILURES_MAX = 5


class ProgressWindow(vmmGObjectUI):
    """Asks for the job's properties again and again: that works where signals are withheld as well."""

    # By the path of the job.
    _windows = {}

    @classmethod
    def show_job(cls, parentobj, conn, path):
        window = cls._windows.get(path)
        if window is None:
            window = cls._windows[path] = ProgressWindow(conn, path)
        window.topwin.set_transient_for(parentobj.topwin)
        window.topwin.present()

    def __init__(self, conn, path):
        vmmGObjectUI.__init__(self, UI_FILE, "vmgang-progress")
        self.conn = conn
        self._path = path
        self._daemon = Daemon()
        self._failures = 0
        self._timeout = None
        self.builder.connect_signals({
            "on_delete_event": self.close,
            "on_close_clicked": self.close,
            "on_abort_clicked": self._abort_clicked,
        })
        self.bind_escape_key_close()
        self._cleanup_on_app_close()
        self._set_header("Migrating...", "")
        self._look()

    def close(self, _ignore1=None, _ignore2=None):
        # Once: the clean-up closes as well. The next window for this job begins anew.
        if self._windows.pop(self._path, None):
            self._daemon.close()
            self._wait_no_more()
            self.topwin.hide()
            self.idle_add(self.cleanup)
        return True

    def _cleanup(self):
        self.conn = None

    # Looking

    def _look(self):
        self._wait_no_more()
        self._daemon.job(self._path, self._told, self._not_told)

    def _look_later(self):
        self._timeout = self.timeout_add(POLL_MILLISECONDS, self._look)

    def _wait_no_more(self):
        if self._timeout:
            self.remove_gobject_timeout(self._timeout)
            self._timeout = None

    def _told(self, properties):
        self._failures = 0
        report = job.result(properties)
        if report is None:
            self._show(properties)
            self._look_later()
        else:
            self._show_end(properties, report)

    def _not_told(self, refusal):
        self._failures += 1
        log.debug("vmgang: cannot look at the job %s: %s", self._path, refusal.sentence)
        if self._failures < FAILURES_MAX:
            self._look_later()
            return
        self.widget("abort").set_sensitive(False)
        self.widget("phase").set_text("Not known")
        self.err.show_err(
            "Lost sight of the migration: %s" % refusal.sentence,
            text2="Members that had not switched over stay on this host. `vmgang history` tells more "
                  "once vmgangd runs again.", details=refusal.name or None)

    # Showing

    def _show(self, properties):
        rows = job.rows(properties)
        title = "Migrating %s" % job.name(properties)
        self._set_header(title, "to %s" % properties["Progress"].get("destination", ""))
        self._show_rows(rows)
        percent = job.percent(rows)
        bar = self.widget("gang-bar")
        bar.set_fraction((percent or 0) / 100)
        bar.set_text("" if percent is None else "%d %%" % percent)
        state = properties["State"]
        self.widget("phase").set_text("%s, %s" % (job.PHASES.get(state, state), job.elapsed(properties)))
        self.widget("amounts").set_text(job.amounts(properties))

    def _show_end(self, properties, report):
        self._set_header("%s: %s" % (job.TITLES.get(report["state"], report["state"]), job.name(properties)),
                         "to %s" % report["destination"])
        self._show_rows(job.result_rows(report))
        self.widget("sent-column").set_title("Sent")
        bar = self.widget("gang-bar")
        bar.set_fraction(1 if report["state"] == "completed" else 0)
        bar.set_text("%s in %s" % (job.TITLES.get(report["state"], report["state"]), job.elapsed_of(report)))
        self.widget("phase").set_text(job.conclusion(report, properties["Statistics"]))
        amounts = report["bytes"]
        self.widget("amounts").set_text("%s\n%s" % (
            sent(amounts["wire"], amounts["qemu_stream"]), saved(amounts["saved"])))
        self.widget("abort").set_sensitive(False)
        self._refresh_lists()
        trouble = job.trouble(report)
        if trouble:
            self.err.show_err("Unable to migrate: %s" % trouble[0], details=trouble[1])

    def _show_rows(self, rows):
        """In place, so that a selection stays."""
        model = self.widget("members").get_model()
        while len(model) > len(rows):
            model.remove(model[-1].iter)
        for index, row in enumerate(rows):
            cells = [row.name, row.state, row.percent or 0,
                     "" if row.percent is None else "%d %%" % row.percent, row.sent, row.remark]
            if index < len(model):
                model[index] = cells
            else:
                model.append(cells)

    def _set_header(self, title, destination):
        self.topwin.set_title(title)
        self.widget("header-label").set_markup("<span size='large'>%s</span>" % xmlutil.xml_escape(title))
        self.widget("header-destination").set_text(destination)

    def _refresh_lists(self):
        """virt-manager looks at its hosts at once, not at its next turn."""
        for conn in vmmConnectionManager.get_instance().conns.values():
            if conn.is_active():
                conn.schedule_priority_tick(pollvm=True)

    # Aborting

    def _abort_clicked(self, _src):
        self.widget("abort").set_sensitive(False)
        self._daemon.abort(self._path, lambda: None, self._not_aborted)

    def _not_aborted(self, refusal):
        self.widget("abort").set_sensitive(True)
        self.err.show_err("Unable to abort: %s" % refusal.sentence, details=refusal.name or None)
