"""The dialog "Migrate gang": what moves, to where, with which options; what it would send; what stands
against it.

Owns the window of dialog.ui. Must not: wait for vmgangd. The job it starts is shown by progress.py.
"""

import os

from virtinst import log, xmlutil
from virtManager.baseclass import vmmGObjectUI
from virtManager.connmanager import vmmConnectionManager

from . import findings, request, survey
from .daemon import Daemon
from .progress import ProgressWindow
from .text import size

UI_FILE = os.path.join(os.path.dirname(__file__), "dialog.ui")


class GangDialog(vmmGObjectUI):
    """One for all of virt-manager, like its own migrate dialog."""

    @classmethod
    def show_instance(cls, parentobj, conn, vm):
        """Asks what to do with the gang of `vm`, or with one of the host if that is None."""
        if not cls._instance:
            cls._instance = GangDialog()
        cls._instance.show(parentobj, conn, vm)

    def __init__(self):
        vmmGObjectUI.__init__(self, UI_FILE, "vmgang-migrate")
        self.conn = None
        self._parent = None
        self._vm = None
        self._daemon = None
        self._choices = []
        self._jobs = []
        self._findings = []
        self.builder.connect_signals({
            "on_delete_event": self.close,
            "on_cancel_clicked": self.close,
            "on_finish_clicked": self._finish_clicked,
            "on_choice_changed": self._choice_changed,
            "on_destination_changed": self._destination_changed,
            "on_estimate_clicked": self._estimate_clicked,
            "on_check_clicked": self._check_clicked,
        })
        for value, label in request.ON_STALL:
            self.widget("on-stall").append(value, label)
        entry = self.widget("destination").get_child()
        entry.set_placeholder_text("qemu+tls://HOST/system")
        entry.get_accessible().set_name("destination")
        self.bind_escape_key_close()
        self._cleanup_on_app_close()

    def _cleanup(self):
        self.conn = self._parent = self._vm = None

    def show(self, parentobj, conn, vm):
        log.debug("Showing vmgang's migrate dialog")
        self.close()
        self.conn, self._parent, self._vm = conn, parentobj, vm
        self._daemon = Daemon()
        self._reset()
        self.topwin.set_transient_for(parentobj.topwin)
        self.topwin.present()
        self._daemon.survey(self._surveyed, self._survey_failed)

    def close(self, _ignore1=None, _ignore2=None):
        # A job that has begun goes on.
        if self._daemon:
            self._daemon.close()
            self._daemon = None
        self.reset_finish_cursor()
        self.topwin.hide()
        return True

    # What there is

    def _reset(self):
        self._choices, self._jobs, self._findings = [], [], []
        self.widget("choice").remove_all()
        self.widget("members").get_model().clear()
        self.widget("source").set_text(
            "%s (%s)" % (self.conn.libvirt_gethostname(), self.conn.get_pretty_desc()))
        self._set_header("Migrate gang")
        self._hint("")
        self._said("Asking vmgangd...")
        self.widget("spinner").hide()
        self.widget("advanced").set_expanded(False)
        for name in ("leave-failed", "postcopy", "unsafe", "temporary"):
            self.widget(name).set_active(False)
        self.widget("bandwidth").set_value(0)
        self.widget("on-stall").set_active(0)
        self._fill_destinations()
        self._update_buttons()
        self.widget("destination").get_child().grab_focus()

    def _fill_destinations(self):
        """The other hosts that virt-manager knows, as it reaches them; any other can be typed."""
        destination = self.widget("destination")
        destination.remove_all()
        destination.get_child().set_text("")
        for conn in vmmConnectionManager.get_instance().conns.values():
            if conn.is_remote() and conn.is_qemu_privileged():
                destination.append_text(conn.get_uri())
        destination.set_active(0)

    def _surveyed(self, gangs, jobs):
        self._said("")
        self._jobs = jobs
        vm = self._vm and _member(self._vm)
        host = [_member(each) for each in self.conn.list_vms() if each.is_active()]
        self._choices = survey.choices(gangs, vm, sorted(host))
        if self._vm and self._job():
            self._show_job()
            return
        for choice in self._choices:
            self.widget("choice").append_text(choice.label)
        self.widget("choice").set_active(0)

    def _survey_failed(self, refusal):
        self.close()
        self._parent.err.show_err("Cannot migrate a gang: %s" % refusal.sentence, details=refusal.name or None)

    def _choice(self):
        """The one that is chosen; until the user has, the most likely."""
        index = max(self.widget("choice").get_active(), 0)
        return self._choices[index] if self._choices else None

    def _job(self):
        choice = self._choice()
        return survey.job_of(choice, self._jobs) if choice else None

    def _destination(self):
        return self.widget("destination").get_child().get_text().strip()

    # What is chosen

    def _choice_changed(self, _src):
        choice = self._choice()
        if not choice:
            return
        self._set_header("Migrate gang '%s'" % choice.gang if choice.gang else "Migrate %s" % (
            "all VMs" if choice.all else "'%s'" % choice.domains[0]))
        self._findings = []
        self._said("")
        self._show_findings()
        self._update_buttons()
        if choice.gang and choice.members:
            # About the members; everybody may ask that.
            self._daemon.diagnose("", choice.gang, self._members_diagnosed,
                                  lambda refusal: log.debug("vmgang: no diagnosis: %s", refusal.sentence))

    def _destination_changed(self, _src):
        self._update_buttons()

    def _update_buttons(self):
        choice, job, destination = self._choice(), self._job(), self._destination()
        reason = ""
        if not choice or not survey.movable(choice):
            reason = "No VM of these runs."
        elif not job and not destination:
            reason = "Say to which host."
        self._allow("finish", reason)
        self.widget("finish").set_label("_Show progress" if job else "_Migrate")
        no_gang = "" if choice and choice.gang and choice.members else "Only gangs are looked at beforehand."
        self._allow("estimate", no_gang)
        self._allow("check", no_gang or ("" if destination else "Say to which host."))

    def _allow(self, name, reason):
        self.widget(name).set_sensitive(not reason)
        self.widget(name).set_tooltip_text(reason or None)

    def _show_findings(self):
        """The members with what was found about them, and the rest below."""
        choice, job = self._choice(), self._job()
        names = [member.name for member in choice.members]
        about = findings.of_members(self._findings, names)
        model = self.widget("members").get_model()
        model.clear()
        for member in choice.members:
            remark = about.get(member.name)
            model.append([member.name, member.state.capitalize(), size(member.memory),
                          findings.ICONS[remark.level] if remark else None,
                          xmlutil.xml_escape(remark.text) if remark else "Nothing was found against it.",
                          member.state != survey.SHUT_OFF])
        other = findings.of_hosts(self._findings, names)
        worst = max(list(about.values()) + ([other] if other else []), default=None,
                    key=lambda remark: findings.LEVELS.index(remark.level))
        if job:
            self._hint("It is being migrated to %s." % job.destination)
        elif choice.hint:
            self._hint(choice.hint)
        elif worst:
            self._hint((other or worst).text, findings.ICONS[worst.level])
        else:
            self._hint("")

    # What would happen

    def _members_diagnosed(self, diagnosis):
        # The host itself is looked at when its destination is.
        names = [member.name for member in self._choice().members]
        self._findings = [finding for finding in diagnosis["findings"]
                          if set(finding["subject"].split(", ")) & set(names)]
        self._show_findings()

    def _estimate_clicked(self, _src):
        self._busy("Reading the memory of the VMs...")
        self._daemon.estimate(self._choice().gang, self._answered(
            lambda estimate: self._said(findings.estimated(estimate))), self._asking_failed)

    def _check_clicked(self, _src):
        self._busy("Looking at both hosts...")
        self._daemon.diagnose(self._destination(), self._choice().gang,
                              self._answered(self._hosts_diagnosed), self._asking_failed)

    def _hosts_diagnosed(self, diagnosis):
        self._findings = diagnosis["findings"]
        self._said("A migration would be possible." if diagnosis["ready"]
                   else "A migration would be refused.")
        self._show_findings()

    def _answered(self, show):
        """Shows an answer, unless something else has been chosen meanwhile."""
        asked = self._choice()

        def answered(answer):
            self._idle()
            if self._choice() is asked:
                show(answer)

        return answered

    def _asking_failed(self, refusal):
        self._idle()
        self._said("")
        self.err.show_err(refusal.sentence, details=refusal.name or None)

    # The migration

    def _finish_clicked(self, _src):
        if self._job():
            self._show_job()
            return
        choice = self._choice()
        settings = {name: self.widget(name).get_active()
                    for name in ("leave-failed", "postcopy", "unsafe", "temporary")}
        settings["bandwidth"] = self.widget("bandwidth").get_value_as_int()
        settings["on-stall"] = self.widget("on-stall").get_active_id()
        self.set_finish_cursor()
        self._daemon.migrate(choice.gang, self._destination(), request.options(choice, settings),
                             self._started, self._refused)

    def _started(self, path):
        parent, conn = self._parent, self.conn
        self.close()
        ProgressWindow.show_job(parent, conn, path)

    def _refused(self, refusal):
        self.reset_finish_cursor()
        self.err.show_err("Unable to migrate: %s" % refusal.sentence, details=refusal.name or None)

    def _show_job(self):
        self._started(self._job().path)

    # Words on the window

    def _set_header(self, text):
        self.widget("header-label").set_markup("<span size='large'>%s</span>" % xmlutil.xml_escape(text))

    def _hint(self, text, icon="dialog-information"):
        self.widget("hint").set_text(text)
        self.widget("hint-icon").set_from_icon_name(icon, 1)
        self.widget("hint-box").set_visible(bool(text))

    def _said(self, text):
        self.widget("said").set_text(text)

    def _busy(self, text):
        self._said(text)
        self.widget("spinner").show()
        self.widget("spinner").start()
        for name in ("estimate", "check"):
            self.widget(name).set_sensitive(False)

    def _idle(self):
        self.widget("spinner").stop()
        self.widget("spinner").hide()
        self._update_buttons()


def _member(vm):
    """A VM as virt-manager knows it."""
    state = "paused" if vm.is_paused() else "running" if vm.is_active() else survey.SHUT_OFF
    # In KiB.
    return survey.Member(vm.get_name(), vm.get_uuid(), state, vm.get_xmlobj().currentMemory * 1024)
