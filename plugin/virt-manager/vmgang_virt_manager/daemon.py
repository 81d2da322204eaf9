"""vmgangd on the system bus: asynchronous calls, and its errors as sentences.

Owns the names and signatures, which are those of `/usr/share/dbus-1/interfaces/org.vmgang.*.xml`. Must not:
block, or know a widget. Each call takes `done`, which gets the answer, and `failed`, which gets a Refusal.
"""

import json
from collections import namedtuple

from gi.repository import Gio, GLib

from .survey import RUNNING_JOBS, Gang, Job, Member

BUS_NAME = "org.vmgang.VMGang1"
MANAGER_PATH = "/org/vmgang/VMGang1"
MANAGER = "org.vmgang.Manager1"
JOB = "org.vmgang.Job1"
JOB_PROPERTIES = ("Progress", "Result", "State", "Statistics")
PROPERTIES = "org.freedesktop.DBus.Properties"

# Some answers take as long as an estimate of a large gang, or as a user takes to type a password.
NO_TIMEOUT = GLib.MAXINT32

Refusal = namedtuple("Refusal", "name sentence")

# Errors of the bus itself: nobody is there to answer.
ABSENT = ("ServiceUnknown", "NameHasNoOwner", "Spawn.ExecFailed", "Spawn.ChildExited",
          "Spawn.ServiceNotFound")
GONE = ("NoReply", "Disconnected")


class Daemon:
    """The calls of one window."""

    def __init__(self):
        self._cancellable = Gio.Cancellable()

    def close(self):
        """Forgets calls whose answer is still to come."""
        self._cancellable.cancel()

    def survey(self, done, failed):
        """`done` gets all gangs, and the jobs that run."""
        def gangs_listed(gangs, problems):
            problem = "".join("The metadata of '%s' cannot be read: %s" % each for each in problems[:1])
            members = [lambda done, name=name: self._members(name, problem, done) for name, _on, _all in gangs]
            _all_of(members, lambda gangs: self._running_jobs(lambda jobs: done(gangs, jobs), failed))

        self._manager("ListGangs", None, gangs_listed, failed)

    def diagnose(self, destination, gang, done, failed):
        """The doctor's findings about a gang, and about a destination unless that is empty."""
        asked = GLib.Variant("(sa{sv})", (destination, {"gang": GLib.Variant("s", gang)}))
        self._manager("Diagnose", asked, lambda answer: done(json.loads(answer)), failed,
                      interactive=bool(destination))

    def estimate(self, gang, done, failed):
        asked = GLib.Variant("(sa{sv})", (gang, {}))
        self._manager("Estimate", asked, lambda answer: done(json.loads(answer)), failed, interactive=True)

    def migrate(self, gang, destination, options, done, failed):
        """Takes the options of request.py; `done` gets the path of the job."""
        options = {name: GLib.Variant(*typed) for name, typed in options.items()}
        asked = GLib.Variant("(ssa{sv})", (gang, destination, options))
        self._manager("Migrate", asked, done, failed, interactive=True)

    def job(self, path, done, failed):
        """`done` gets the job's properties."""
        def told(properties):
            # Those that may not be read are left out.
            if len(properties) < len(JOB_PROPERTIES):
                failed(Refusal("", "this user may not look at jobs; have the administrator allow the polkit action "
                                   "org.vmgang.read"))
            else:
                done(properties)

        self._call(path, PROPERTIES, "GetAll", GLib.Variant("(s)", (JOB,)), told, failed)

    def abort(self, path, done, failed):
        self._call(path, JOB, "Abort", None, done, failed, interactive=True)

    def _members(self, gang, problem, done):
        def listed(members):
            done(Gang(gang, [Member(name, uuid, state, memory)
                             for name, uuid, state, _order, memory, _persistent in members], problem))

        def failed(refusal):
            # That gang cannot be migrated; others can.
            done(Gang(gang, [], refusal.sentence))

        self._manager("GetGang", GLib.Variant("(s)", (gang,)), listed, failed)

    def _running_jobs(self, done, failed):
        def listed(jobs):
            running = [job for job in jobs if job[4] in RUNNING_JOBS]
            asked = [lambda done, job=job: self._running_job(job, done) for job in running]
            _all_of(asked, done)

        self._manager("ListJobs", None, listed, failed)

    def _running_job(self, line, done):
        path, _id, gang, destination, _state, _start = line

        def told(properties):
            members = properties.get("Progress", {}).get("members", [])
            done(Job(path, gang, destination, [member["name"] for member in members]))

        # It may be forgotten by now.
        self.job(path, told, lambda _refusal: done(Job(path, gang, destination, [])))

    def _manager(self, method, parameters, done, failed, interactive=False):
        self._call(MANAGER_PATH, MANAGER, method, parameters, done, failed, interactive)

    def _call(self, path, interface, method, parameters, done, failed, interactive=False):
        flags = Gio.DBusCallFlags.NONE
        if interactive:
            flags = Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION

        def connected(_source, result):
            try:
                bus = Gio.bus_get_finish(result)
            except GLib.Error as error:
                self._failed(error, failed)
                return
            bus.call(BUS_NAME, path, interface, method, parameters, None, flags, NO_TIMEOUT,
                     self._cancellable, answered)

        def answered(bus, result):
            try:
                answer = bus.call_finish(result)
            except GLib.Error as error:
                self._failed(error, failed)
                return
            done(*answer.unpack())

        Gio.bus_get(Gio.BusType.SYSTEM, self._cancellable, connected)

    def _failed(self, error, failed):
        if not self._cancellable.is_cancelled():
            failed(refusal(error))


def _all_of(calls, done):
    """Makes calls at once; `done` gets their answers in order."""
    answers = [None] * len(calls)
    missing = set(range(len(calls)))

    def answered(index, answer):
        answers[index] = answer
        missing.discard(index)
        if not missing:
            done(answers)

    for index, call in enumerate(calls):
        call(lambda answer, index=index: answered(index, answer))
    if not calls:
        done(answers)


def refusal(error):
    """An error as one sentence: what vmgangd said, without D-Bus in it."""
    name = Gio.DBusError.get_remote_error(error) or ""
    # What GLib puts before it; its own function for that does not reach Python's copy of the error.
    message = error.message.replace("GDBus.Error:%s: " % name, "", 1)
    return Refusal(name, sentence(name, message))


def sentence(name, message):
    short = name.replace("org.freedesktop.DBus.Error.", "", 1)
    if short in ABSENT:
        return "vmgangd does not run on this host; start it with `systemctl start vmgangd`"
    if short in GONE:
        return ("vmgangd ended while it was asked; see `journalctl -u vmgangd`, "
                "then `vmgang history`")
    if not name and not message:
        return "the system bus cannot be reached; is dbus running on this host?"
    return message or name
