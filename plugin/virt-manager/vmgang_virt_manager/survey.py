"""What there is to migrate on this host, and what is being migrated.

Owns the choices that the dialog offers. Pure: what vmgangd and virt-manager have said in, choices out.
"""

from collections import namedtuple

from .text import vms

# state is virsh's word, memory in bytes.
Member = namedtuple("Member", "name uuid state memory")
# problem is why vmgangd cannot tell the members, or empty.
Gang = namedtuple("Gang", "name members problem")
# names are those of its members.
Job = namedtuple("Job", "path gang destination names")
# gang is empty for VMs that are named; hint is for the user, one sentence or none.
Choice = namedtuple("Choice", "label gang domains all members hint")

RUNNING_JOBS = ("preparing", "running", "switching")
SHUT_OFF = "shut off"


def choices(gangs, vm, host):
    """What may be migrated, the most likely first: `vm` is the Member that was pointed at, or None for the
    host; `host` has all its running VMs."""
    of_gangs = [_of_gang(gang) for gang in sorted(gangs, key=lambda gang: gang.name)]
    everything = Choice(
        "All running VMs of this host (%s)" % vms(len(host)), "", [], True, host,
        "VMs of several gangs share what they send; only do that with VMs that trust each other.")
    if vm is None:
        return of_gangs + [everything]
    mine = [choice for choice in of_gangs if vm.uuid in [member.uuid for member in choice.members]]
    alone = Choice("Only '%s'" % vm.name, "", [vm.name], False, [vm], "" if mine else _no_gang(vm.name))
    return mine + [alone] + [choice for choice in of_gangs if choice not in mine] + [everything]


def job_of(choice, jobs):
    """The running job that has this gang or one of these VMs, if there is one."""
    names = {member.name for member in choice.members}
    for job in jobs:
        if (choice.gang and job.gang == choice.gang) or names.intersection(job.names):
            return job
    return None


def movable(choice):
    """How many VMs would move: those that are shut off stay."""
    return sum(member.state != SHUT_OFF for member in choice.members)


def _of_gang(gang):
    running = sum(member.state != SHUT_OFF for member in gang.members)
    label = "Gang '%s' (%s)" % (gang.name, vms(running))
    return Choice(label, gang.name, [], False, gang.members, gang.problem)


def _no_gang(name):
    return ("'%s' is in no gang. VMs become one with `vmgang gang add GANG VM...`; then they move together, "
            "and what they share is sent once." % name)
